#!/usr/bin/env python3
"""What `upmoe plan` foretells beside what runs on this machine take: memory and the time of a step.

Every shape, number of ranks and train.recompute: the bytes of rank 0's tensors (within 5 %), the resident memory of its
process (within 15 %), and, with one or two ranks and a description of this machine, the time of a step (within 15 %).
The result is printed and written to tests/bench/results/.
usage: .venv/bin/python tests/bench/plan_against_measured.py [--machine FILE]
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench_record import ROOT, checked, choices_of, parser_of, run_tool, train, write_record, write_run

ALLOWED = {"tensors": 0.05, "resident": 0.15, "seconds": 0.15}
TIMED_RANKS = 2  # more share the cores of a small machine


def plan(args, folder, shape, precision, ranks, settings):
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        config = write_run(folder, run_dir, shape, precision, steps=1, **settings)
        machine = ["--machine", args.machine] if args.machine else []
        done = checked([args.binary, "plan", config, "--world", str(ranks), "--json", *machine], 1)
    found = json.loads(done.stdout)
    rank = next(r for r in found["ranks"] if r["rank"] == 0)
    memory = rank["memory"]
    outside = memory["process"] + memory["checkpoint"]
    tensors = sum(memory[key] for key in ("weights", "gradients", "optimizer", "activations", "communication",
                                          "workspace"))
    return {"tensors": tensors, "resident": tensors + outside,
            "seconds": found["time"]["seconds"] if found["time"] else None}


def measure(args, folder, shape, precision, ranks, settings):
    records, _ = train(folder, args.binary, shape, precision, ranks=ranks, threads=args.threads,
                       steps=args.steps + args.warmup, **settings)
    return {"tensors": records[-1]["tensors_peak_bytes"], "resident": records[-1]["memory_peak_bytes"],
            "seconds": median(r["seconds"] for r in records[args.warmup:])}


def compare(args, folder, shape, precision, ranks, recompute):
    settings = {"recompute": recompute, "micro_batches": ranks, "parallel": {"ep": ranks}}
    foretold = plan(args, folder, shape, precision, ranks, settings)
    measured = measure(args, folder, shape, precision, ranks, settings)
    result = {"shape": shape, "precision": precision, "ranks": ranks, "recompute": recompute, "within": {}}
    for key, allowed in ALLOWED.items():
        result[key] = {"foretold": foretold[key], "measured": measured[key]}
        if foretold[key] is None or key == "seconds" and ranks > TIMED_RANKS:
            continue
        result[key]["ratio"] = foretold[key] / measured[key]
        result["within"][key] = abs(result[key]["ratio"] - 1) <= allowed
    words = "  ".join(f"{key} {result[key]['ratio']:.3f}{'' if ok else ' (!)'}" for key, ok in result["within"].items())
    print(f"{shape:6}{precision:6}{ranks} rank{'s' if ranks > 1 else ' '}  {recompute:10}{words}", flush=True)
    return result


def main():
    parser = parser_of(__doc__, ["tiny", "mid"], ["fp32"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--policies", nargs="+", help="values of train.recompute (default: all)")
    own = ROOT / "configs" / "machines" / "this.yaml"
    parser.add_argument("--machine", type=Path, default=own if own.exists() else None,
                        help="what `upmoe doctor --measure` wrote; without it times are not compared")
    args = parser.parse_args()
    policies = args.policies or choices_of(args.binary, "train.recompute")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            for precision in args.precisions:
                for ranks in args.ranks:
                    for recompute in policies:
                        results.append(compare(args, Path(folder), shape, precision, ranks, recompute))
    missed = sum(not ok for r in results for ok in r["within"].values())
    print(f"{missed} of {sum(len(r['within']) for r in results)} outside of what is allowed")
    described = args.machine.read_text(encoding="utf-8") if args.machine else None
    write_record(args.out, "plan_against_measured.py", sys.argv[1:], results, threads=args.threads, allowed=ALLOWED,
                 outside=missed, described=described)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(run_tool("plan_against_measured", main))
