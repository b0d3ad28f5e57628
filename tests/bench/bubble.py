#!/usr/bin/env python3
"""What a pipeline of two stages loses to its bubble, measured and in theory.

A step of m micro-batches takes a + b m seconds; steps of several m give both by least squares, where b is what a
micro-batch costs once the pipeline is full, and a what filling and draining it costs (and the optimizer, which every
layout has). The work itself, w per micro-batch on one rank, is twice the b of dp 2, which divides the same products
over the same two ranks and has no bubble. Theory, with the largest stage's share s in the cost of a micro-batch (the
program says it) and v chunks per stage: b = s w, and (1 - s) w / v of filling and draining in a.
usage: .venv/bin/python tests/bench/bubble.py
"""

import re
import sys
import tempfile
from pathlib import Path
from statistics import linear_regression, median

from bench_record import SHAPES, parser_of, run_tool, train, write_record

MICRO_BATCHES = (2, 4, 8, 16)
LAYOUTS = {"dp 2": {}, "pp 2": {"pp": 2}, "pp 2 x 2 chunks": {"pp": 2, "pp_chunks": 2}}


def run(args, folder, shape, precision, layout, micro_batches):
    """(median seconds of a step, largest share of a stage)."""
    records, said = train(folder, args.binary, shape, precision, ranks=2, steps=args.steps + args.warmup,
                          micro_batches=micro_batches, global_batch=micro_batches * args.micro_batch,
                          parallel=LAYOUTS[layout])
    shares = [float(share) / 100 for share in re.findall(r"\(([0-9.]+) %\)", said)]
    return median(r["seconds"] for r in records[args.warmup:]), max(shares, default=0.5)


def measure(args, folder, shape, precision):
    rounds = {layout: {m: [] for m in MICRO_BATCHES} for layout in LAYOUTS}
    for _ in range(args.rounds):
        for m in MICRO_BATCHES:
            for layout, found in rounds.items():
                found[m].append(run(args, folder, shape, precision, layout, m))
    fits = {}
    for layout, found in rounds.items():
        seconds = [median(r[0] for r in found[m]) for m in MICRO_BATCHES]
        fits[layout] = linear_regression(MICRO_BATCHES, seconds)
        print(f"{shape:6}{precision:6}{layout:18}seconds of a step of {MICRO_BATCHES} micro-batches: "
              + " ".join(f"{s:.3f}" for s in seconds), flush=True)
    work = 2 * fits["dp 2"].slope
    results = []
    for layout, v in (("pp 2", 1), ("pp 2 x 2 chunks", 2)):
        share = rounds[layout][MICRO_BATCHES[0]][0][1]
        found = {"shape": shape, "precision": precision, "layout": layout, "largest_share": share,
                 "micro_batch_on_one_rank_s": work, "per_micro_batch": fits[layout].slope / work,
                 "per_micro_batch_in_theory": share, "fixed": fits[layout].intercept / work,
                 "fill_and_drain_in_theory": (1 - share) / v, "fixed_of_dp": fits["dp 2"].intercept / work,
                 "rounds": rounds[layout], "dp_rounds": rounds["dp 2"]}
        results.append(found)
        print(f"{shape:6}{precision:6}{layout:18}in micro-batches on one rank ({work:.3f} s): each costs "
              f"{found['per_micro_batch']:.2f}, in theory {share:.2f}; fixed {found['fixed']:.2f}, of which filling "
              f"and draining in theory {found['fill_and_drain_in_theory']:.2f} (dp 2: fixed "
              f"{found['fixed_of_dp']:.2f})",
              flush=True)
    return results


def main():
    parser = parser_of(__doc__, ["tiny"], ["fp32"])
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences (default: 2)")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            for precision in args.precisions:
                results += measure(args, Path(folder), shape, precision)
    write_record(args.out, "bubble.py", sys.argv[1:], results,
                 tokens_per_micro_batch={s: args.micro_batch * SHAPES[s]["seq_len"] for s in args.shapes})


if __name__ == "__main__":
    sys.exit(run_tool("bubble", main))
