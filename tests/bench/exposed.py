#!/usr/bin/env python3
"""How long a step waits for communication on two ranks of one thread each, with overlap and without.

Without overlap means that every transfer is waited for where it begins; both modes take turns within one process per
rank (bench_exposed), so the pair is of one run. The result is printed and written to tests/bench/results/.
usage: .venv/bin/python tests/bench/exposed.py
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench_record import ROOT, checked, local_ranks, parser_of, run_tool, write_record, write_run

LAYOUTS = {"dp 2": {}, "ep 2": {"ep": 2}, "tp 2": {"tp": 2}, "cp 2": {"cp": 2}, "pp 2": {"pp": 2}}


def run(args, folder, shape, precision, layout):
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        config = write_run(folder, run_dir, shape, precision, steps=1000, micro_batches=4,
                           parallel=LAYOUTS[layout] | {"reduce": args.reduce})
        done = checked([*local_ranks(2), args.binary, config, str(args.steps),
                        str(args.rounds)], threads=1)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main():
    parser = parser_of(__doc__, ["tiny", "mid"], ["fp32"])
    parser.set_defaults(binary=ROOT / "build" / "release" / "bin" / "bench_exposed")
    parser.add_argument("--reduce", choices=("fp32", "bf16"), default="fp32", help="dtype of gradients")
    args = parser.parse_args()
    results = []
    print("seconds of a step, and of it waiting: each transfer waited for at once; under way beside computation")
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            for precision in args.precisions:
                for layout in LAYOUTS:
                    rounds = run(args, Path(folder), shape, precision, layout)
                    found = {"shape": shape, "precision": precision, "layout": layout, "rounds": rounds}
                    for overlapped, name in ((False, "at_once"), (True, "overlapped")):
                        for key in ("step_s", "exposed_s"):
                            found[f"{name}_{key}"] = median(r[key] for r in rounds if r["overlapped"] == overlapped)
                    results.append(found)
                    print(f"{shape:6}{precision:6}{layout:6}{found['at_once_step_s']:9.3f}"
                          f"{found['at_once_exposed_s']:9.3f}{found['overlapped_step_s']:12.3f}"
                          f"{found['overlapped_exposed_s']:9.3f}", flush=True)
    write_record(args.out, "exposed.py", sys.argv[1:], results)


if __name__ == "__main__":
    sys.exit(run_tool("exposed", main))
