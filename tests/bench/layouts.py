#!/usr/bin/env python3
"""What a parallel axis costs: two ranks with one thread each against one rank with two threads, the same step.

Every layout runs in turn, several rounds, each in processes of its own; the figure is the median step. The same work
divided in two would take the same time: what is missing from a ratio of 1 is communication, waiting and smaller
products. The result is printed and written to tests/bench/results/. usage: .venv/bin/python tests/bench/layouts.py
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from against_transformers import ROOT, SHAPES, machine, write_tokens

LAYOUTS = {"one rank": {}, "dp 2": {}, "ep 2": {"ep": 2}, "tp 2": {"tp": 2}, "cp 2": {"cp": 2}, "pp 2": {"pp": 2},
           "pp 2 x 2 chunks": {"pp": 2, "pp_chunks": 2}, "etp 2": {"etp": 2}}


def run(args, folder, shape, precision, layout):
    """Four micro-batches a step in every layout, so that a pipeline has something to fill it with."""
    s = SHAPES[shape]
    model, tokens = folder / shape, folder / f"{shape}.h5"
    if not tokens.exists():
        model.mkdir()
        (model / "config.json").write_text(json.dumps(s["config"]), encoding="utf-8")
        write_tokens(tokens, s["config"]["vocab_size"], s["sequences"] * s["seq_len"] * 4 + 1)
    ranks = 1 if layout == "one rank" else 2
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        config = folder / "run.yaml"
        config.write_text(f"""run: {{dir: {run_dir}/run, seed: 1}}
model: {{path: {model}, init: random}}
data: {{train: [{{path: {tokens}, weight: 1.0}}], seq_len: {s["seq_len"]}}}
train: {{steps: {args.steps + args.warmup}, global_batch: {s["sequences"]}, micro_batch: {s["sequences"] // 4},
         precision: {precision}}}
parallel: {json.dumps(LAYOUTS[layout])}
log: {{every: 1, tensorboard: false}}
""", encoding="utf-8")
        command = [ROOT / "launch" / "run_local.sh", str(ranks)] if ranks > 1 else []
        done = subprocess.run([*command, args.binary, "train", config], capture_output=True, text=True, check=False,
                              env=os.environ | {"OMP_NUM_THREADS": str(args.threads // ranks)})
        if done.returncode != 0:
            raise SystemExit(f"upmoe train failed with {done.returncode}:\n{done.stderr}")
        lines = (Path(run_dir) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "kind" not in record]
    return {"step_s": median(r["seconds"] for r in records[args.warmup:]), "loss": records[-1]["loss"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=ROOT / "build" / "release" / "upmoe")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps a round (default: 5)")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "bench" / "results")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            for precision in args.precisions:
                rounds = {layout: [] for layout in LAYOUTS}
                for _ in range(args.rounds):
                    for layout, found in rounds.items():
                        found.append(run(args, Path(folder), shape, precision, layout))
                one = median(r["step_s"] for r in rounds["one rank"])
                for layout, found in rounds.items():
                    step = median(r["step_s"] for r in found)
                    results.append({"shape": shape, "precision": precision, "layout": layout, "step_s": step,
                                    "speed_of_one_rank": one / step, "rounds": found})
                    print(f"{shape:6}{precision:6}{layout:18}{step:9.3f} s a step{one / step:8.2f} of one rank's speed"
                          f"   loss {found[-1]['loss']:.6f}", flush=True)
    date = datetime.datetime.now(datetime.timezone.utc)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    path = args.out / f"layouts_{date:%Y%m%d_%H%M%S}.json"
    record = {"date": date.isoformat(), "command": " ".join(["tests/bench/layouts.py", *sys.argv[1:]]),
              "commit": commit.stdout.strip(), "threads": args.threads, "machine": machine(), "results": results}
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
