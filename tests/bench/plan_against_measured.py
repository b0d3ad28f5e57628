#!/usr/bin/env python3
"""What `upmoe plan` foretells beside what runs on this machine take: memory and the time of a step.

Every shape, number of ranks and train.recompute: the bytes of rank 0's tensors (within 5 %) and, with a description of
this machine, the resident memory of its process, the copy for a checkpoint included (within 15 %), and with one or two
ranks the time of a step (within 15 %). The description is what doctor writes for as many ranks as share the cores, as
  launch/run_local.sh 2 build/release/upmoe doctor --measure > this.yaml    # then --machine this.yaml
does; --measure does so before the lines of each shape and number of ranks, as what a virtual machine reaches changes
within the hour.
Each line is printed, and kept in a record in tests/bench/results/, as soon as it is there: what is stopped with Ctrl-C
has what was measured until then. A middle shape takes 18 GB of memory, 15 GB of the temporary folder's disk, and about
two minutes a line on two cores; the tiny one a quarter of a minute.
usage: .venv/bin/python tests/bench/plan_against_measured.py [--machine FILE | --measure] [--shapes tiny] [--ranks 1 2]
"""

import datetime
import json
import re
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench_record import ROOT, checked, choices_of, local_ranks, parser_of, run_tool, train, write_record, write_run

ALLOWED = {"tensors": 0.05, "resident": 0.15, "seconds": 0.15}
TIMED_RANKS = 2  # more share the cores of a small machine


def one_node(described, ranks):
    """The description of a machine, for ranks that all run on it, also where it has fewer cores."""
    return re.sub(r"(?m)^ranks_per_node: *(\d+)", lambda m: f"ranks_per_node: {max(ranks, int(m[1]))}", described)


def described_now(args):
    ranks = min(args.threads, args.timed_ranks)
    return checked([*local_ranks(ranks), args.binary, "doctor", "--measure"], args.threads // ranks).stdout


def plan(args, folder, shape, precision, ranks, settings):
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        config = write_run(folder, run_dir, shape, precision, steps=1, **settings)
        machine = []
        if args.described:
            machine = ["--machine", Path(run_dir) / "machine.yaml"]
            machine[1].write_text(one_node(args.described, ranks), encoding="utf-8")
        done = checked([args.binary, "plan", config, "--world", str(ranks), "--json", *machine], 1)
    found = json.loads(done.stdout)
    rank = next(r for r in found["ranks"] if r["rank"] == 0)
    memory = rank["memory"]
    tensors = sum(memory[key] for key in ("weights", "gradients", "optimizer", "activations", "communication",
                                          "workspace"))
    # What a process takes besides is the machine's to say.
    return {"tensors": tensors,
            "resident": tensors + memory["process"] + memory["checkpoint"] if args.described else None,
            "seconds": found["time"]["seconds"] if found["time"] and ranks <= args.timed_ranks else None}


def measure(args, folder, shape, precision, ranks, settings):
    """After the steps that are timed it saves, and makes one step more, whose line has the copy in its memory."""
    timed = args.warmup + args.steps
    records, _ = train(folder, args.binary, shape, precision, ranks=ranks, threads=args.threads, steps=timed + 1,
                       save_every=timed, **settings)
    return {"tensors": records[-1]["tensors_peak_bytes"], "resident": records[-1]["memory_peak_bytes"],
            "seconds": median(r["seconds"] for r in records[args.warmup:timed])}


def compare(args, folder, shape, precision, ranks, recompute):
    settings = {"recompute": recompute, "micro_batches": ranks, "parallel": {"ep": ranks}}
    foretold = plan(args, folder, shape, precision, ranks, settings)
    measured = measure(args, folder, shape, precision, ranks, settings)
    result = {"shape": shape, "precision": precision, "ranks": ranks, "recompute": recompute, "within": {}}
    if args.measure:
        result["described"] = args.described
    for key, allowed in ALLOWED.items():
        result[key] = {"foretold": foretold[key], "measured": measured[key]}
        if foretold[key] is None:
            continue
        result[key]["ratio"] = foretold[key] / measured[key]
        result["within"][key] = abs(result[key]["ratio"] - 1) <= allowed
    words = "  ".join(f"{key} {result[key]['ratio']:.3f}{'' if ok else ' (!)'}" for key, ok in result["within"].items())
    print(f"{shape:6}{precision:6}{ranks} rank{'s' if ranks > 1 else ' '}  {recompute:12}{words}", flush=True)
    return result


def main():
    parser = parser_of(__doc__, ["tiny", "mid"], ["fp32"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--memory", dest="timed_ranks", action="store_const", const=0, default=TIMED_RANKS,
                        help="compare memory alone, which other work on the machine does not change")
    parser.add_argument("--policies", nargs="+", help="values of train.recompute (default: all)")
    own = ROOT / "configs" / "machines" / "this.yaml"
    described = parser.add_mutually_exclusive_group()
    described.add_argument("--machine", type=Path, default=own if own.exists() else None,
                           help="what `upmoe doctor --measure` wrote; without it neither resident memory nor times are "
                                "compared")
    described.add_argument("--measure", action="store_true",
                           help="the description is doctor's, measured again for each")
    args = parser.parse_args()
    if args.measure and not args.timed_ranks:
        raise SystemExit("--measure is for times, which --memory leaves out")
    args.described = args.machine.read_text(encoding="utf-8") if args.machine else None
    lines = [(shape, precision, ranks, recompute) for shape in args.shapes for precision in args.precisions
             for ranks in args.ranks for recompute in args.policies or choices_of(args.binary, "train.recompute")]
    date, results, missed = datetime.datetime.now(datetime.timezone.utc), [], 0
    with tempfile.TemporaryDirectory() as folder:
        for before, line in zip([None, *lines], lines):
            if args.measure and (before is None or before[:3] != line[:3]):
                args.described = described_now(args)
            results.append(compare(args, Path(folder), *line))
            missed = sum(not ok for r in results for ok in r["within"].values())
            write_record(args.out, "plan_against_measured.py", sys.argv[1:], results, date=date, threads=args.threads,
                         allowed=ALLOWED, outside=missed, lines_left=len(lines) - len(results),
                         described=None if args.measure else args.described)
    print(f"{missed} of {sum(len(r['within']) for r in results)} outside of what is allowed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(run_tool("plan_against_measured", main))
