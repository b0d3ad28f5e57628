#!/usr/bin/env python3
"""What idle threads cost others and themselves: a step while nothing else runs, and beside processes that compute.

Ways to wait, in turn, several rounds, each in a process of its own: as the program does by default (a bounded
search for work, then sleep), as the OpenMP library would by itself, and asleep at once (passive). Wanted: no slower
than the library's way on an idle machine, within 1.3 of passive on a busy one. The figure of a round is its median
step, the ratios are medians of the rounds' ratios. Run it on a machine that does nothing else.
The result is printed and written to tests/bench/results/. usage: .venv/bin/python tests/bench/busy_machine.py
"""

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench_record import parser_of, run_tool, train, write_record

WAYS = {"default": {}, "library": {"GOMP_SPINCOUNT": "300000"}, "passive": {"OMP_WAIT_POLICY": "passive"}}


@contextmanager
def others(count):
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


@contextmanager
def waiting(way):
    before = {name: os.environ.pop(name, None) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    os.environ.update(WAYS[way])
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def main():
    parser = parser_of(__doc__, ["tiny", "mid"], ["fp32"])
    parser.add_argument("--hogs", type=int, default=os.cpu_count(), help="other processes of the busy half")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--ways", nargs="+", choices=sorted(WAYS), default=list(WAYS), help="default: all; the "
                        "library's takes minutes a step where more ranks than cores wait beside others")
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="other numbers of turns to try beside")
    args = parser.parse_args()
    if "default" not in args.ways:
        parser.error("--ways: the default is what the others are compared with")
    for way in set(WAYS) - set(args.ways):
        del WAYS[way]
    WAYS.update({f"{n} turns": {"GOMP_SPINCOUNT": str(n)} for n in args.spins})
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            for ranks in args.ranks:
                for hogs in sorted({0, args.hogs}):
                    steps = {way: [] for way in WAYS}
                    for _ in range(args.rounds):
                        for way, found in steps.items():
                            with others(hogs), waiting(way):
                                records, _ = train(Path(folder), args.binary, shape, "fp32", ranks=ranks,
                                                   threads=max(args.threads, ranks), steps=args.steps + args.warmup,
                                                   micro_batches=ranks)
                            found.append(median(r["seconds"] for r in records[args.warmup:]))
                    ratio = {way: median(d / o for d, o in zip(steps["default"], steps[way]))
                             for way in ("library", "passive") if way in steps}
                    results.append({"shape": shape, "ranks": ranks, "others": hogs, "step_s": steps,
                                    **{f"of_{way}": value for way, value in ratio.items()}})
                    figures = "   ".join(f"{way} {median(s):.3f} s" for way, s in steps.items())
                    print(f"{shape:6}{ranks} ranks, {hogs} others   {figures}   " +
                          "   ".join(f"default/{way} {value:.2f}" for way, value in ratio.items()), flush=True)
    write_record(args.out, "busy_machine.py", sys.argv[1:], results, threads=args.threads)


if __name__ == "__main__":
    sys.exit(run_tool("busy_machine", main))
