#!/usr/bin/env python3
"""What `upmoe plan` foretells beside the records that are kept here, as the tables of docs/plan.md.

Of GPUs (tests/gpu_suite.sh) each whole step is planned now, of as many layers as it had, and laid beside its memory and
time. Of CPUs the records of plan_against_measured.py are told, which have both sides.
usage: .venv/bin/python tests/bench/plan_against_records.py
tests/launch/plan_command_test.py holds the document to it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_record import ROOT, run_tool

RESULTS = ROOT / "tests" / "bench" / "results"
GPUS = {"h200": "h200-sxm", "h100_80gb_hbm3": "h100-sxm"}  # as records and configs/machines call them
# As tests/bench/bench_step ran them: layers, tokens of a step, train.recompute, optimizer.name.
STEPS = {"full_16384_none": (24, 16384, "none", "adamw8bit"),
         "full_24576_swiglu": (24, 24576, "swiglu", "adamw8bit"),
         "full_32768_routed_up": (24, 32768, "routed_up", "adamw8bit"),
         "largest_19_layers": (19, 8192, "routed_up", "adamw8bit"),
         "four_layers_8192": (4, 8192, "none", "adamw8bit"),
         "four_layers_16384": (4, 16384, "none", "adamw8bit"),
         "four_layers_32768": (4, 32768, "none", "adamw8bit"),
         "four_layers_adamw": (4, 16384, "none", "adamw")}
SEQ_LEN = 2048


def plan(binary, machine, layers, tokens, recompute, optimizer):
    with tempfile.TemporaryDirectory() as folder:
        shape = json.loads((ROOT / "configs" / "models" / "qwen1.5-moe-a2.7b.json").read_text(encoding="utf-8"))
        model, run = Path(folder) / "config.json", Path(folder) / "run.yaml"
        model.write_text(json.dumps(shape | {"num_hidden_layers": layers}), encoding="utf-8")
        batch = tokens // SEQ_LEN
        run.write_text(f"run: {{dir: {folder}/run}}\nmodel: {{path: {model}, init: random}}\n"
                       f"data: {{train: {folder}/train.h5, seq_len: {SEQ_LEN}}}\n"
                       f"train: {{steps: 1, global_batch: {batch}, micro_batch: {batch}, precision: bf16,\n"
                       f"        recompute: {recompute}}}\n"
                       f"parallel: {{reduce: bf16}}\noptimizer: {{name: {optimizer}}}\n", encoding="utf-8")
        done = subprocess.run([binary, "plan", run, "--world", "1", "--machine", machine, "--json"],
                              capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{layers} layers, {tokens} tokens: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    return found["memory_fullest"]["total"] / 2**30, found["time"]["seconds"]


def beside(foretold, measured, form):
    return f"{form.format(foretold)} | {form.format(measured)} | {100 * (foretold / measured - 1):+.1f} %"


def of_gpus(binary):
    rows = ["| GPU, layers, tokens, recompute, optimizer | GiB foretold | measured | | s foretold | measured | |",
            "|---|---:|---:|---:|---:|---:|---:|"]
    for gpu, machine in GPUS.items():
        for path in sorted(RESULTS.glob(f"gpu_suite_{gpu}_*.json")):
            steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
            for name, (layers, tokens, recompute, optimizer) in STEPS.items():
                if name not in steps:
                    continue
                gib, seconds = plan(binary, machine, layers, tokens, recompute, optimizer)
                measured = steps[name]
                rows.append(f"| {gpu.split('_')[0].upper()}, {layers}, {tokens:,}, {recompute}, {optimizer} | "
                            f"{beside(gib, measured['gpu_memory_used_mib_peak'] / 1024, '{:.1f}')} | "
                            f"{beside(seconds, measured['seconds'], '{:.3f}')} |")
    return rows


def spread(lines, key):
    """Of foretold / measured, the least and the most."""
    ratios = [line[key]["ratio"] for line in lines if "ratio" in line[key]]
    return f"{min(ratios):.3f} to {max(ratios):.3f}" if ratios else "-"


def of_a_cpu(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    checks = [ok for line in record["results"] for ok in line["within"].values()]
    rows = [f"{record['machine']['processor']}, {record['machine']['cores']} cores ({path.name}): foretold / "
            "measured, least and most of the",
            f"ways of recomputing; {len(checks) - checks.count(True)} of {len(checks)} numbers are outside of what is "
            "allowed:", "", "| shape | ranks | ways | tensors | resident | seconds |", "|---|---:|---:|---|---|---|"]
    kinds = dict.fromkeys((line["shape"], line["precision"], line["ranks"]) for line in record["results"])
    for kind in kinds:
        lines = [line for line in record["results"] if (line["shape"], line["precision"], line["ranks"]) == kind]
        rows.append(f"| {kind[0]}, {kind[1]} | {kind[2]} | {len(lines)} | {spread(lines, 'tensors')} | "
                    f"{spread(lines, 'resident')} | {spread(lines, 'seconds')} |")
    return ["", *rows]


def of_cpus():
    return [row for path in sorted(RESULTS.glob("plan_against_measured_*.json")) for row in of_a_cpu(path)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=ROOT / "build" / "release" / "upmoe")
    args = parser.parse_args()
    print("\n".join([*of_gpus(args.binary), *of_cpus()]))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("plan_against_records", main))
