#!/usr/bin/env python3
"""Loads an exported directory in transformers: no missing, unexpected or mismatched key, and the same logits as upmoe.

    upmoe eval MODEL_DIR --data TOKENS.h5 --seq-len 128 --sequences 4 --logits LOGITS.safetensors
    python tests/check_export_in_transformers.py MODEL_DIR LOGITS.safetensors TOKENS.h5

Needs torch, transformers, safetensors and h5py; not part of the test suite. Exit status 0 only if all agrees.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "tests" / "support")]
from command_line import BadUsage, run_tool  # noqa: E402

try:  # what --help does without
    import h5py
    import torch
    import transformers
    from safetensors.torch import load_file

    import deepseek_moe  # noqa: F401  a family that transformers has no class of its own for
    MISSING = None
except ImportError as missing:
    MISSING = missing


def require_packages(missing=MISSING, cure="tests/golden/README.md says which ones are needed, and h5py"):
    """For a tool that is about to begin, behind its arguments."""
    if missing:
        raise BadUsage(f"{sys.executable} cannot import {missing.name}; {cure}")


def read_sequences(token_file, sequences, seq_len):
    with h5py.File(token_file, "r") as file:
        tokens = file["tokens"][:sequences * seq_len]
    if tokens.size < sequences * seq_len:
        raise SystemExit(f"{token_file}: {tokens.size} tokens, fewer than the {sequences} x {seq_len} of the logits")
    return torch.from_numpy(tokens.astype("int64")).view(sequences, seq_len)


def largest_differences(model, expected, token_file):
    sequences, seq_len, _ = expected.shape
    absolute, disagreeing = 0.0, 0
    for row, want in zip(read_sequences(token_file, sequences, seq_len), expected):
        with torch.no_grad():
            got = model(row[None], use_cache=False).logits[0].float()
        if got.shape != want.shape:
            raise SystemExit(f"logits: transformers gives {tuple(got.shape)}, upmoe wrote {tuple(want.shape)}")
        absolute = max(absolute, (got - want).abs().max().item())
        disagreeing += (got.argmax(-1) != want.argmax(-1)).sum().item()
    return absolute, disagreeing, sequences * seq_len


def load(folder):
    """The model and, of what does not fit, a line for each kind."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True)
    wrong = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(key) for key in info.get(kind) or [])
        print(f"{kind}: {len(found)}" + (f", such as {found[:5]}" if found else ""))
        wrong += [kind] if found else []
    print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    return model, wrong


def agrees(folder, logits, token_file, tolerance=1e-4, save=None):
    """Whether transformers reads all of it and computes the same. `save`: where transformers saves it again."""
    model, wrong = load(folder)
    if save:
        model.save_pretrained(save)
    expected = load_file(logits)["logits"]
    if not torch.isfinite(expected).all():
        raise SystemExit(f"{logits}: not all logits are finite")
    absolute, disagreeing, tokens = largest_differences(model.eval(), expected, token_file)
    print(f"logits of {tokens} tokens: largest difference {absolute:.3g} (allowed {tolerance:g}), "
          f"{disagreeing} differ in the likeliest token")
    return not wrong and absolute <= tolerance


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("logits", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest absolute difference (default: 1e-4)")
    parser.add_argument("--save", type=Path, help="save the loaded model again, as transformers does, in this folder")
    args = parser.parse_args()
    require_packages()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    same = agrees(args.model, args.logits, args.tokens, args.tolerance, args.save)
    print("same model" if same else "FAILED")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(run_tool("check_export_in_transformers", main))
