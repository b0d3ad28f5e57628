#!/usr/bin/env python3
"""A step with masked targets beside torch: loss, number of targets and gradient norm on four meshes.

    python tests/check_masked_step_in_torch.py build/release/upmoe

torch computes cross_entropy with ignore_index, reduction "mean", over the whole global batch at once; upmoe's ranks
have its sequences one by one, some of them without any target that counts. Needs torch, transformers, safetensors and
h5py; not part of the test suite. Exit status 0 only if all agrees.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from check_export_in_transformers import ROOT, require_packages, run_tool
from tiny_run import ENVIRONMENT, mpirun

try:  # what --help does without
    import h5py
    import numpy
    import torch
    import transformers
    from safetensors.numpy import load_file, save_file
    MISSING = None
except ImportError as missing:
    MISSING = missing

MESHES = {"alone": (1, {}), "dp 4, ep 2": (4, {"ep": 2}), "tp 2, cp 2": (4, {"tp": 2, "cp": 2}),
          "pp 2, dp 2": (4, {"pp": 2})}
SEQUENCES = 4
TOLERANCE = 1e-4


def write_model(case, folder):
    """The golden case as a Hugging Face directory; its rows of tokens."""
    shutil.copytree(ROOT / "tests/golden" / case, folder)
    (folder / "tokenizer.json").write_text("{}")
    tensors = load_file(ROOT / f"tests/golden/{case}.safetensors")
    weights = {name: value for name, value in tensors.items() if name.startswith(("model.", "lm_head."))}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors["tokens"][:SEQUENCES]


def mask_of(rows):
    """Of each token of the stream: of four sequences one has no target that counts, one only in its first half."""
    length = rows.shape[1] - 1
    target = numpy.arange(SEQUENCES * length)
    sequence, place = target // length, target % length
    counts = numpy.where(sequence == 2, place < length // 2, (sequence != 1) & (target % 3 == 0))
    return numpy.concatenate([[0], counts]).astype("u1")


def write_tokens(path, rows, mask, vocab_size):
    tokens = numpy.concatenate([rows[:, :-1].reshape(-1), rows[-1:, -1]]).astype("<u4")
    with h5py.File(path, "w") as out:
        out["tokens"], out["loss_mask"] = tokens, mask
        out["document_ends"] = numpy.array([len(tokens)], dtype="<i8")
        for name, value in {"format": "upmoe-tokens-1", "tokenizer_sha256": "0" * 64}.items():
            out.attrs[name] = numpy.bytes_(value.encode())
        out.attrs["vocab_size"], out.attrs["eos_id"] = vocab_size, -1


def in_torch(folder, rows, mask):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    rows = torch.from_numpy(rows.astype("int64"))
    targets = rows[:, 1:].reshape(-1).clone()
    targets[torch.from_numpy(mask[1:]) == 0] = -1
    logits = model(rows[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(len(targets), -1), targets, ignore_index=-1)
    loss.backward()
    squares = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
    return {"loss": loss.item(), "grad_norm": squares.sqrt().item(), "targets": int((targets != -1).sum())}


def in_upmoe(upmoe, work, name, ranks, parallel, seq_len):
    run = work / name.replace(" ", "_").replace(",", "")
    config = {"run": {"dir": str(run)}, "model": {"path": str(work / "model")}, "router": {"aux_loss": 0},
              "data": {"train": [{"path": str(work / "tokens.h5"), "loss_mask": True}], "seq_len": seq_len,
                       "shuffle": False},
              "train": {"steps": 1, "global_batch": SEQUENCES, "micro_batch": 1}, "parallel": parallel, "device": "cpu"}
    file = work / "run.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    done = subprocess.run([*mpirun(ranks), upmoe, "train", file], env=ENVIRONMENT, capture_output=True, text=True,
                          check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name}: upmoe ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return next(line for line in lines if line.get("step") == 1 and "loss" in line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("upmoe", type=Path)
    parser.add_argument("--case", default="moe_a27b", help="of tests/golden (default %(default)s)")
    args = parser.parse_args()
    require_packages(MISSING)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = write_model(args.case, work / "model")
        mask = mask_of(rows)
        vocab_size = json.loads((work / "model/config.json").read_text())["vocab_size"]
        write_tokens(work / "tokens.h5", rows, mask, vocab_size)
        expected = in_torch(work / "model", rows, mask)
        print(f"{'torch':12} loss {expected['loss']:.6f}, norm {expected['grad_norm']:.6f}, "
              f"{expected['targets']} targets")
        for name, (ranks, parallel) in MESHES.items():
            got = in_upmoe(args.upmoe.resolve(), work, name, ranks, parallel, rows.shape[1] - 1)
            good = got["targets"] == expected["targets"] and all(
                abs(got[key] - expected[key]) <= TOLERANCE * expected[key] for key in ("loss", "grad_norm"))
            failed |= not good
            print(f"{name:12} loss {got['loss']:.6f}, norm {got['grad_norm']:.6f}, {got['targets']} targets"
                  f"{'' if good else '  DIFFERS'}")
    print("FAILED" if failed else "the same step")
    return failed


if __name__ == "__main__":
    sys.exit(run_tool("check_masked_step_in_torch", main))
