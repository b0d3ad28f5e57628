#!/usr/bin/env python3
"""Low-rank adapters that upmoe trained, in PEFT: the logits of the merged export, or what PEFT says instead.

    tests/adapters_in_peft.py [--build build/release] [NAME ...]      NAME: a case, such as mixtral-experts

For each case a small model is made and trained by upmoe with adapters at the targets named, and exported twice: the
adapters alone (`--adapter`), and the model with them in its weights (`--merge`). transformers loads the model that was
trained, PEFT puts the adapters beside it, and its logits must be those that `upmoe eval` gives of the merged model.
Where PEFT is known not to take a case, or to leave tensors out without a word, that must still be so; logits of another
model fail. Needs the packages of tests/peft_requirements.txt and a build with the target make_run; not part of the test
suite. Exit status 0 only if every case ends as it should.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path

import check_export_in_transformers
from check_export_in_transformers import ROOT, require_packages, run_tool
from round_trips import make_dense, run

try:  # what --help does without
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file
    MISSING = check_export_in_transformers.MISSING
except ImportError as missing:
    MISSING = missing

TOLERANCE = 1e-4  # of a logit, as check_export_in_transformers.py has it
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NETWORK = ("gate_proj", "up_proj", "down_proj")
# case: recipe or, of a dense model, None; the family that the dense model is for; targets; what PEFT is known to say
CASES = {
    "llama": (None, "deepseek", ATTENTION + NETWORK, None),
    "qwen2": (None, "qwen2_moe", ATTENTION + NETWORK, None),
    "qwen3": (None, "qwen3_moe", ATTENTION + NETWORK, None),
    "qwen2_moe-attention": ("qwen1.5-moe-a2.7b", "qwen2_moe", ATTENTION, None),
    "qwen2_moe-experts": ("qwen1.5-moe-a2.7b", "qwen2_moe", ATTENTION + NETWORK, "leaves out"),
    "mixtral-attention": ("mixtral-8x", "mixtral", ATTENTION, None),
    "mixtral-experts": ("mixtral-8x", "mixtral", ATTENTION + NETWORK, None),
    "mixtral-down": ("mixtral-8x", "mixtral", ("down_proj",), None),
    "mixtral-up": ("mixtral-8x", "mixtral", ("up_proj",), "without also targeting"),
    "qwen3_moe-attention": ("qwen3-30b-like", "qwen3_moe", ATTENTION, None),
    "qwen3_moe-experts": ("qwen3-30b-like", "qwen3_moe", ATTENTION + NETWORK, None),
    "dots1-attention": ("dots1-like", "dots1", ATTENTION, None),
    "dots1-experts": ("dots1-like", "dots1", ATTENTION + NETWORK, "leaves out"),
    "deepseek-experts": ("deepseekmoe", "deepseek", ATTENTION + NETWORK, "leaves out"),
}


def trained(upmoe, work, folder, case):
    """A model with adapters, trained: (the model, its adapters in PEFT's form, the logits of the merged model)."""
    recipe, family, targets, _ = CASES[case]
    base, adapter, merged = folder / "base", folder / "adapter", folder / "merged"
    make_dense(folder / "dense" if recipe else base, family)
    if recipe:
        run(upmoe, "upcycle", ROOT / f"configs/upcycle/{recipe}-tiny.yaml", "--from", folder / "dense", "--to", base)
    run(upmoe, "train", work / "run.yaml", f"run.dir={folder / 'run'}", f"model.path={base}", "model.init=weights",
        "train.steps=8", "parallel.ep=1", "optimizer.lr=1e-2", "lora.rank=4", "lora.alpha=8",
        f"lora.targets=[{', '.join(targets)}]")
    run(upmoe, "export", folder / "run", "--adapter", "--to", adapter)
    run(upmoe, "export", folder / "run", "--merge", "--to", merged, "--dtype", "fp32")
    logits = folder / "logits.safetensors"
    run(upmoe, "eval", merged, "--data", work / "tokens.h5", "--seq-len", 32, "--sequences", 4, "--logits", logits)
    return base, adapter, load_file(logits)["logits"]


class LeftOut(Exception):
    """PEFT loads the adapters without an error, and not all of them."""


def beside(model, adapter):
    """The model with the adapters beside it, every tensor of them in its place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")  # missing ones
        model = peft.PeftModel.from_pretrained(model, adapter)
    # It says nothing of tensors that found no place: loaded once more, it names them.
    told = peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(adapter), device="cpu"))
    if told.unexpected_keys:
        names = sorted(told.unexpected_keys)
        raise LeftOut(f"leaves out {len(names)} tensors in silence, such as {names[0]}")
    return model.eval()


def in_peft(base, adapter, expected, tokens):
    """(largest difference of a logit, how far the adapters move one)."""
    model, wrong = check_export_in_transformers.load(base)
    if wrong:
        raise SystemExit(f"{base}: transformers does not read the model itself: {wrong}")
    before, _, _ = check_export_in_transformers.largest_differences(model.eval(), expected, tokens)
    after, _, _ = check_export_in_transformers.largest_differences(beside(model, adapter), expected, tokens)
    return after, before


def outcome(case, upmoe, work, folder):
    """(whether the case ended as it should, words)."""
    base, adapter, expected = trained(upmoe, work, folder, case)
    known = CASES[case][3]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            after, before = in_peft(base, adapter, expected, work / "tokens.h5")
    except (LeftOut, ValueError, KeyError, RuntimeError, UserWarning) as e:
        words = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        return known is not None and known in words, f"PEFT does not take it: {words}"
    if before < 100 * TOLERANCE:
        return False, f"the adapters move no logit by more than {before:.3g}: nothing is tried"
    words = f"largest difference of a logit {after:.3g}, of {before:.3g} that the adapters move"
    return after <= TOLERANCE and known is None, words + ("" if known is None else "; PEFT takes it by now")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build/release")
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    for name in args.names:
        if name not in CASES:
            parser.error(f"no case '{name}'; there are {', '.join(CASES)}")
    require_packages(MISSING, "tests/peft_requirements.txt has the packages that are needed")
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as top:
        work = Path(top) / "run"
        run(args.build / "bin/make_run", work)
        for case in args.names or CASES:
            folder = Path(top) / case
            folder.mkdir()
            good, words = outcome(case, args.build / "upmoe", work, folder)
            failed += not good
            print(f"{case:20} {'as it should' if good else 'FAILED':13} {words}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_tool("adapters_in_peft", main))
