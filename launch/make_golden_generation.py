#!/usr/bin/env python3
"""Writes tests/golden/generated.json: what transformers' greedy generation says for the models of tests/golden.

Needs what launch/make_golden.py needs, whose files are there already: the models are those of their seeds. 64 tokens
behind a prompt of 8, computed in fp64 with transformers' own cache, and the same ones without it. Prompts are drawn
until no token's first logit is near its second, no expert that was chosen near one that was not, and the tokens are
others where those behind the prompt stand one place too far: a model that says the same whatever stands where would
hold nobody to the right places.
"""

import argparse
import json
from pathlib import Path

import safetensors
import torch
import transformers

from make_golden import CASES, MARGIN_LATER, RouterProbe, build, golden_mixtures, in_float64, routing_margin

PROMPT, NEW = 8, 64
KINDS = 6  # of tokens among the new ones, at least
# What attention and the FFN of a block add to the hidden state, so many times: as they are, these models, whose head is
# their embedding, say the token before again and again. A power of two is exact in every type.
LAYERS_TIMES = {"gemma": 4.0, "qwen3": 4.0}
MARGIN_LOGITS = 1e-3  # a hundred times what logits of fp32 are away by


def greedy(model, prompt):
    """The new tokens and the least distance of a first logit to its second."""
    model.generation_config.eos_token_id = None  # random weights say it at random
    model.generation_config.pad_token_id = 0
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW,
                          use_cache=True, return_dict_in_generate=True, output_logits=True)
    two = torch.cat(made.logits).topk(2, dim=-1).values
    return made.sequences[0, PROMPT:], (two[:, 0] - two[:, 1]).min().item()


def without_cache(model, prompt, tokens, gap=0):
    """`gap`: between the prompt and the others."""
    positions = torch.arange(PROMPT + NEW)
    positions[PROMPT:] += gap
    logits = model(torch.cat((prompt[0], tokens))[None], position_ids=positions[None], use_cache=False).logits[0]
    return logits[PROMPT - 1:-1].argmax(dim=-1)


def say_more(model, times):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")):
                weight.mul_(times)


def generated(case, folder):
    with safetensors.safe_open(folder / f"{case}.safetensors", "pt") as file:
        seed = int(file.metadata()["seed"])
    model = build(case, seed, torch.float64)
    times = LAYERS_TIMES.get(case, 1.0)
    say_more(model, times)
    probe = RouterProbe(model)
    for draw in range(2000):
        generator = torch.Generator().manual_seed(draw)
        prompt = torch.randint(CASES[case][0]["vocab_size"], (1, PROMPT), generator=generator)
        with torch.no_grad(), in_float64():
            tokens, margin = greedy(model, prompt)
            layers = probe.take()
            routing = routing_margin(layers, golden_mixtures.top_k(model.config)) if layers else 1.0
            if margin < MARGIN_LOGITS or routing < MARGIN_LATER:
                continue
            if not torch.equal(without_cache(model, prompt, tokens), tokens):
                raise SystemExit(f"{case}: transformers says other tokens without its cache")
            if len(tokens.unique()) < KINDS or torch.equal(without_cache(model, prompt, tokens, gap=1), tokens):
                continue
        print(f"{case}: draw {draw}, {len(tokens.unique())} kinds of tokens, logits {margin:.1e}, routing "
              f"{routing:.1e} apart", flush=True)
        more = {"layers_times": times} if case in LAYERS_TIMES else {}
        return more | {"prompt": prompt[0].tolist(), "tokens": tokens.tolist()}
    raise SystemExit(f"{case}: no prompt keeps the tokens away from ties, of {KINDS} kinds and in their places")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "tests" / "golden")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    path = args.out / "generated.json"
    cases = json.loads(path.read_text()) if path.exists() else {}
    cases["made_by"] = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, fp64"
    for case in args.cases or CASES:
        cases[case] = generated(case, args.out)
    lines = (f"{json.dumps(name)}: {json.dumps(cases[name])}" for name in sorted(cases))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
