#!/usr/bin/env python3
"""What PyTorch and transformers do on this GPU at the shapes of bench_gpu and bench_step, bf16, random data.

usage: gpu_peers.py [--tokens 8192 16384 32768] [--layers 4] [--out FILE]

Prints one line for each measurement and writes all as JSON: a product of two 8192 x 8192 matrices, causal attention
(SDPA), grouped products (torch._grouped_mm), transformers' Qwen2Moe decoder layer forward and backward with each of its
experts implementations, and training steps (forward, backward, fused AdamW) of a model of that many layers. Times are
medians between device events. What does not run here says why.
"""

import argparse
import json
import sys
from statistics import median

from bench_record import run_tool

WIDTH, HEADS, HEAD, VOCAB, SEQ = 2048, 16, 128, 151936, 2048
EXPERTS, TOP_K, EXPERT_WIDTH, SHARED_WIDTH = 60, 4, 1408, 5632
results, out = [], None


def milliseconds(work, goes=5, warmup=3):
    """Of one call: the median of a few goes of many calls each, as bench_gpu has it."""
    import torch

    def go(calls):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls

    for _ in range(warmup):
        once = go(1)
    calls = max(1, min(200, int(50 / once)))
    return median(go(calls) for _ in range(goes))


def record(name, work, flops=0.0, **more):
    """Runs and reports; an error is a result too, and the memory is free again for the next one."""
    import torch

    try:
        ms = milliseconds(work())
        entry = {"name": name, "milliseconds": ms, "tflops": flops / ms * 1e-9, **more}
    except (RuntimeError, AttributeError, ValueError, ImportError, TypeError) as e:
        entry = {"name": name, "error": str(e).splitlines()[0][:300], **more}
    torch.cuda.empty_cache()
    results.append(entry)
    print(json.dumps(entry), flush=True)
    save()


def save():
    """All so far: what ends this program, time perhaps, should cost no more than what was under way."""
    import torch
    import transformers

    if out:
        with open(out, "w", encoding="utf-8") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                       "transformers": transformers.__version__, "results": results}, file, indent=1)


def random(*shape, grad=False):
    import torch

    return torch.rand(*shape, device="cuda", dtype=torch.bfloat16).mul_(2).sub_(1).requires_grad_(grad)


def gemm():
    a, b = random(8192, 8192), random(8192, 8192)
    return lambda: a @ b


def attention(tokens, backward):
    import torch
    import torch.nn.functional as F

    q, k, v = (random(tokens // SEQ, HEADS, SEQ, HEAD, grad=backward) for _ in range(3))
    dout = random(tokens // SEQ, HEADS, SEQ, HEAD)

    def run():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if backward:
            torch.autograd.grad(out, (q, k, v), dout)  # not backward(), which would add to what is there

    return run


def rows_of_experts(tokens, routing):
    """Where each expert's rows end: as an untrained router gives them, or by Zipf's law, as time_variants has it."""
    import torch

    shares = torch.ones(EXPERTS) if routing == "balanced" else 1.0 / torch.arange(1, EXPERTS + 1)
    choice = torch.multinomial(shares, tokens * TOP_K, replacement=True, generator=torch.Generator().manual_seed(3))
    return torch.bincount(choice, minlength=EXPERTS).cumsum(0).to("cuda", torch.int32)


def grouped(tokens, product, routing):
    """One of the six products of the routed experts, forward and backward."""
    import torch

    rows, ends = tokens * TOP_K, rows_of_experts(tokens, routing)
    wide, hidden = (WIDTH, 2 * EXPERT_WIDTH), (EXPERT_WIDTH, WIDTH)  # of a row, before and behind each layer
    inside, outside = wide if "gate_up" in product else hidden
    x, dy, w = random(rows, inside), random(rows, outside), random(EXPERTS, inside, outside)
    turned = w.transpose(-2, -1)
    return {"forward": lambda: torch._grouped_mm(x, w, offs=ends),
            "input": lambda: torch._grouped_mm(dy, turned, offs=ends),
            "weight": lambda: torch._grouped_mm(x.t(), dy, offs=ends)}[product.split()[-1]]


def grouped_swiglu(tokens):
    """The same product with what the fused kernel has in it: rows gathered before, SwiGLU and weights behind."""
    import torch
    import torch.nn.functional as F

    rows = tokens * TOP_K
    x, w = random(tokens, WIDTH), random(EXPERTS, WIDTH, 2 * EXPERT_WIDTH)
    token = torch.randperm(rows, device="cuda") // TOP_K
    weight = random(rows, 1)
    ends = rows_of_experts(tokens, "balanced")

    def run():
        gate, up = torch._grouped_mm(x[token], w, offs=ends).chunk(2, -1)
        return F.silu(gate) * up * weight

    return run


def config_of(layers, experts_implementation):
    from transformers import Qwen2MoeConfig

    config = Qwen2MoeConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, intermediate_size=SHARED_WIDTH,
        num_hidden_layers=layers, num_experts=EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=EXPERT_WIDTH,
        shared_expert_intermediate_size=SHARED_WIDTH, vocab_size=VOCAB, max_position_embeddings=SEQ,
        norm_topk_prob=False, use_cache=False)
    config._attn_implementation = "sdpa"
    config._experts_implementation = experts_implementation
    return config


def layer(tokens, implementation):
    import torch
    from transformers.models.qwen2_moe import modeling_qwen2_moe as source

    config = config_of(1, implementation)
    block = source.Qwen2MoeDecoderLayer(config, 0).to("cuda", torch.bfloat16)
    rotary = source.Qwen2MoeRotaryEmbedding(config).to("cuda")
    x, g = random(tokens // SEQ, SEQ, WIDTH, grad=True), random(tokens // SEQ, SEQ, WIDTH)
    places = torch.arange(SEQ, device="cuda")[None]
    embeddings = rotary(x, places)

    def run():
        y = block(x, position_embeddings=embeddings, position_ids=places)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(g)
        block.zero_grad(set_to_none=True)

    return run


def step(tokens, layers, implementation):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config_of(layers, implementation), dtype=torch.bfloat16)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = torch.randint(VOCAB, (tokens // SEQ, SEQ), device="cuda")

    def run():
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def main():
    global out
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 16384, 32768])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out")
    args = parser.parse_args()
    out = args.out
    record("gemm 8192^3", gemm, 2.0 * 8192**3)
    for tokens in args.tokens:
        seen = tokens * SEQ / 2 * HEADS * HEAD * 4  # causal: half of the pairs
        record(f"attention_forward/{tokens}", lambda t=tokens: attention(t, False), seen)
        record(f"attention_forward_and_gradient/{tokens}", lambda t=tokens: attention(t, True), 3.5 * seen)
        flops = 4.0 * tokens * TOP_K * WIDTH * EXPERT_WIDTH
        for routing in ("balanced", "zipf"):
            for of, share in (("gate_up", 1), ("down", 2)):
                for way in ("forward", "input", "weight"):
                    record(f"grouped_mm {of} {way}, {routing}/{tokens}",
                           lambda t=tokens, p=f"{of} {way}", r=routing: grouped(t, p, r), flops / share)
        record(f"grouped_mm gate_up, gather, SwiGLU/{tokens}", lambda t=tokens: grouped_swiglu(t), flops)
        for name in ("grouped_mm", "eager"):
            record(f"layer_forward_backward/{tokens}", lambda t=tokens, n=name: layer(t, n), experts=name)
        # Whole steps that compute one expert after another take two to five times as long (gpu_suite_h200_20261126_*).
        for name in ("grouped_mm", "eager") if tokens == min(args.tokens) else ("grouped_mm",):
            record(f"step of {args.layers} layers/{tokens}", lambda t=tokens, n=name: step(t, args.layers, n),
                   experts=name)
    record("gemm 8192^3, after", gemm, 2.0 * 8192**3)  # on a card that has become warm


if __name__ == "__main__":
    sys.exit(run_tool("gpu_peers", main))
