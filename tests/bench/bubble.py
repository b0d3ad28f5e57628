#!/usr/bin/env python3
"""What a pipeline of two stages loses to its bubble, measured and in theory, for growing numbers of micro-batches.

The work itself is timed as dp 2 of the same batch, which divides the same products over the same two ranks and has no
bubble. Theory: with m micro-batches, shares s of the stages in the cost of a micro-batch (the program says them) and v
chunks per stage, a step takes m max(s) + (1 - max(s)) / v of the time of one micro-batch on one rank. What is left
over is messages, waiting and everything else. usage: .venv/bin/python tests/bench/bubble.py
"""

import re
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench_record import SHAPES, parser_of, train, write_record

MICRO_BATCHES = (2, 4, 8, 16)
LAYOUTS = {"dp 2": {}, "pp 2": {"pp": 2}, "pp 2 x 2 chunks": {"pp": 2, "pp_chunks": 2}}


def run(args, folder, shape, precision, layout, micro_batches):
    """(median seconds of a step, largest share of a stage)."""
    records, said = train(folder, args.binary, shape, precision, ranks=2, steps=args.steps + args.warmup,
                          micro_batches=micro_batches, global_batch=micro_batches * args.micro_batch,
                          parallel=LAYOUTS[layout])
    shares = [float(share) / 100 for share in re.findall(r"\(([0-9.]+) %\)", said)] if layout != "dp 2" else [0.5]
    return median(r["seconds"] for r in records[args.warmup:]), max(shares)


def main():
    parser = parser_of(__doc__, ["tiny"], ["fp32"])
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences (default: 2)")
    args = parser.parse_args()
    results = []
    print("share of dp 2's speed: measured, in theory with these stages, and with even ones")
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            for precision in args.precisions:
                for m in MICRO_BATCHES:
                    rounds = {layout: [] for layout in LAYOUTS}
                    for _ in range(args.rounds):
                        for layout, found in rounds.items():
                            found.append(run(args, Path(folder), shape, precision, layout, m))
                    step = {layout: median(r[0] for r in found) for layout, found in rounds.items()}
                    for layout, v in (("pp 2", 1), ("pp 2 x 2 chunks", 2)):
                        largest = rounds[layout][0][1]
                        theory = (m / 2) / (m * largest + (1 - largest) / v)
                        even = m / (m + 1 / v)
                        measured = step["dp 2"] / step[layout]
                        results.append({"shape": shape, "precision": precision, "layout": layout, "micro_batches": m,
                                        "largest_share": largest, "step_s": step[layout], "dp_step_s": step["dp 2"],
                                        "measured": measured, "theory": theory, "theory_of_even_stages": even,
                                        "rounds": rounds[layout], "dp_rounds": rounds["dp 2"]})
                        print(f"{shape:6}{precision:6}{layout:18}{m:3} micro-batches{measured:8.2f}{theory:8.2f}"
                              f"{even:8.2f}   largest stage {largest:.1%}", flush=True)
    write_record(args.out, "bubble.py", sys.argv[1:], results,
                 tokens_per_micro_batch={s: args.micro_batch * SHAPES[s]["seq_len"] for s in args.shapes})


if __name__ == "__main__":
    main()
