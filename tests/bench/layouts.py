#!/usr/bin/env python3
"""What a parallel axis costs: two ranks with one thread each against one rank with two threads, the same step.

Every layout runs in turn, several rounds, each in processes of its own; the figure is the median step. The same work
divided in two would take the same time: what is missing from a ratio of 1 is communication, waiting and smaller
products. The result is printed and written to tests/bench/results/. usage: .venv/bin/python tests/bench/layouts.py
"""

import sys
import tempfile
from pathlib import Path
from statistics import median

from bench_record import parser_of, run_tool, train, write_record

LAYOUTS = {"one rank": {}, "dp 2": {}, "ep 2": {"ep": 2}, "tp 2": {"tp": 2}, "cp 2": {"cp": 2}, "pp 2": {"pp": 2},
           "pp 2 x 2 chunks": {"pp": 2, "pp_chunks": 2}, "etp 2": {"etp": 2}}


def run(args, folder, shape, precision, layout):
    """Four micro-batches a step in every layout, so that a pipeline has something to fill it with."""
    records, _ = train(folder, args.binary, shape, precision, steps=args.steps + args.warmup, micro_batches=4,
                       ranks=1 if layout == "one rank" else 2, threads=args.threads, parallel=LAYOUTS[layout])
    return {"step_s": median(r["seconds"] for r in records[args.warmup:]), "loss": records[-1]["loss"]}


def main():
    args = parser_of(__doc__, ["tiny"], ["fp32"]).parse_args()
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
                    print(f"{shape:6}{precision:6}{layout:18}{step:9.3f} s a step"
                          f"{one / step:8.2f} of one rank's speed   loss {found[-1]['loss']:.6f}", flush=True)
    write_record(args.out, "layouts.py", sys.argv[1:], results, threads=args.threads)


if __name__ == "__main__":
    sys.exit(run_tool("layouts", main))
