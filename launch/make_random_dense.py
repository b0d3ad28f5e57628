#!/usr/bin/env python3
"""Writes a dense Qwen2 directory with random weights, in the exact shapes and names of a real one.

For trying the upcycler at full size without a download; needs the Python standard library alone. Weights are normal
with deviation --std, norm weights one. They are cut from a table of a few million normal numbers at random places, so
that billions of them take as long as writing them; models smaller than the table get numbers of their own throughout.
"""

import argparse
import json
import random
import struct
import sys
from array import array
from pathlib import Path

from command_line import BadInput, ToolParser, run_tool

QWEN15_1_8B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5504,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PRESETS = {"qwen1.5-1.8b": QWEN15_1_8B}
TABLE = 1 << 22
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
         "vocab_size")
DTYPES = {"bf16": ("BF16", "H", "bfloat16"), "fp32": ("F32", "f", "float32")}


def tensors_of(c):
    """(name, shape) of every tensor, in the order of transformers' state dict."""
    hidden, ffn, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    head = c.get("head_dim") or hidden // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield layer + f"self_attn.{name}_proj.weight", (rows, hidden)
            if c.get("qkv_bias", True):
                yield layer + f"self_attn.{name}_proj.bias", (rows,)
        yield layer + "self_attn.o_proj.weight", (hidden, q)
        yield layer + "mlp.gate_proj.weight", (ffn, hidden)
        yield layer + "mlp.up_proj.weight", (ffn, hidden)
        yield layer + "mlp.down_proj.weight", (hidden, ffn)
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not c.get("tie_word_embeddings", False):
        yield "lm_head.weight", (vocab, hidden)


def elements_of(shape):
    n = 1
    for d in shape:
        n *= d
    return n


def encode(values, dtype):
    """Floats as little-endian bytes of the element type (bf16 by cutting the lower half off)."""
    floats = array("f", values)
    return floats.tobytes() if dtype == "fp32" else array("H", floats.tobytes())[1::2].tobytes()


class Numbers:
    def __init__(self, total, std, dtype, seed):
        self.random = random.Random(seed)
        self.size = array(DTYPES[dtype][1]).itemsize
        self.own = total <= TABLE
        self.table = encode((self.random.gauss(0.0, std) for _ in range(min(total, TABLE))), dtype)
        self.next = 0

    def blocks(self, count):
        """Bytes of `count` numbers, in blocks."""
        while count > 0:
            if self.own:
                start, n = self.next, count
                self.next += count
            else:
                start = self.random.randrange(TABLE // 2)
                n = min(count, TABLE - start)
            yield memoryview(self.table)[start * self.size:(start + n) * self.size]
            count -= n


def header_of(tensors, dtype, size):
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors:
        end = at + elements_of(shape) * size
        entries[name] = {"dtype": DTYPES[dtype][0], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_model(out, config, dtype, std, seed):
    tensors = list(tensors_of(config))
    total = sum(elements_of(shape) for _, shape in tensors)
    numbers = Numbers(total, std, dtype, seed)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "model.safetensors", "wb") as f:
        f.write(header_of(tensors, dtype, numbers.size))
        for name, shape in tensors:
            if name.endswith("norm.weight"):
                f.write(encode([1.0] * elements_of(shape), dtype))
                continue
            for block in numbers.blocks(elements_of(shape)):
                f.write(block)
    (out / "config.json").write_text(json.dumps(dict(config, torch_dtype=DTYPES[dtype][2]), indent=2) + "\n")
    generation = {k: config[k] for k in ("bos_token_id", "eos_token_id") if k in config}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    print(f"{out}: {len(tensors)} tensors, {total:,} parameters")


def read_config(path):
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise BadInput(f"{path}: not valid JSON: {problem}") from None
    if not isinstance(config, dict) or config.get("model_type") != "qwen2":
        raise BadInput(f"{path}: not the config.json of a model with model_type 'qwen2'")
    for key in SIZES:
        if not isinstance(config.get(key), int) or not 0 < config[key] < 1 << 31:
            raise BadInput(f"{path}: {key} is {config.get(key)!r}, expected a size")
    return config


def main():
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to be made")
    parser.add_argument("--config", default="qwen1.5-1.8b", help=f"config.json, or one of: {', '.join(PRESETS)}")
    parser.add_argument("--std", type=float, default=0.02, help="deviation of the weights (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default %(default)s)")
    args = parser.parse_args()
    config = PRESETS.get(args.config) or read_config(args.config)
    if (args.out / "model.safetensors").exists():
        parser.error(f"{args.out} holds a model already")
    write_model(args.out, config, args.dtype, args.std, args.seed)


if __name__ == "__main__":
    sys.exit(run_tool("make_random_dense", main))
