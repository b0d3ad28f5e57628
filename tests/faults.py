#!/usr/bin/env python3
"""Plants faults into a built program and counts how it met them.

flips   single bits of checkpoints and token files
calls   system calls refused one at a time while training, upcycling, exporting, tokenizing (strace)
kills   kill -9 at random moments of the same, then the same command again
power   a disk cut off at any moment of the same: what had reached it is mounted again (root, FUSE, loop devices)
growth  memory and open files over 4,000 steps
deaths  time until a dead or stopped rank has ended its job (MPI)

By hand: all of it takes an hour or two of one core. Trials are numbered, and --seed, --part and --from with --count 1
repeat one; what depends on the machine's timing comes near. --minutes ends a part early and says where to go on.
With --record the results go to a file; what is measured later with the same program is added to it.

Exit status: 0 measured, nothing found; 1 a fault was not met as it should be; 69 a part could not be measured here.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "planted"))
from calls import Calls  # noqa: E402
from deaths import Deaths  # noqa: E402
from flips import Flips  # noqa: E402
from growth import Growth  # noqa: E402
from kills import Kills  # noqa: E402
from measured import Measured, Record  # noqa: E402
from power import Power  # noqa: E402
from subjects import ROOT, NotMeasured, Program, Violation  # noqa: E402

PARTS = {part.name: part for part in (Flips, Calls, Kills, Power, Growth, Deaths)}
CANNOT_RUN = 69


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--count", type=int, help="trials of each part (of calls: all there are; of growth: steps)")
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="N", help="number of the first trial")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="begin no further trial of a part after so long")
    parser.add_argument("--record", type=Path, metavar="FILE", help="JSON, added to where it exists")
    parser.add_argument("--work", type=Path, metavar="DIR", help="a new folder to work in, which is then left there")
    parser.add_argument("--build", type=Path, default=Path(os.environ.get("UPMOE_BUILD", ROOT / "build" / "release")),
                        help="folder of upmoe and bin/ (default: UPMOE_BUILD, or build/release)")
    return parser.parse_args()


@contextmanager
def working_folder(kept, part):
    if kept:
        (kept / part).mkdir(parents=True)
        yield (kept / part).resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="upmoe-faults-") as folder:
            yield Path(folder)


def measure(part, args, measured):
    """Runs the trials of one part; everything is in `measured`."""
    began = said = time.monotonic()
    measured.planned = part.count
    numbers = part.numbers(args.first, args.count)
    for done, number in enumerate(numbers):
        now = time.monotonic()
        if args.minutes and now - began > 60 * args.minutes:
            print(f"{part.name}: stopped after {args.minutes} minutes; go on with --from {number}", flush=True)
            break
        if now - said > 30:
            said = now
            print(f"{part.name}: {done} of {len(numbers)}", flush=True)
        try:
            measured.add(part.trial(number, random.Random(f"{args.seed} {part.name} {number}")))
        except Exception as e:  # a file that cannot be read any more is as bad as one that reads differently
            option = f"--count {number}" if part.name == "growth" else f"--from {number} --count 1"
            recipe = f"tests/faults.py --part {part.name} --seed {args.seed} {option}"
            what = str(e) if isinstance(e, Violation) else f"{type(e).__name__}: {e}"
            measured.violation(recipe, what)
            print(f"{part.name}: VIOLATION: {what}\n  repeat: {recipe}", flush=True)
    measured.seconds = time.monotonic() - began


def main():
    args = parse_arguments()
    if not os.access(args.build / "upmoe", os.X_OK):
        sys.exit(f"faults: {args.build}/upmoe: not there; build it, or name the folder with --build")
    record, results = Record(args.record, args.build / "upmoe"), []
    for name in args.part:
        with working_folder(args.work, name) as folder:
            measured = Measured(name, PARTS[name].shows, args.seed)
            try:
                part = PARTS[name](Program(args.build.resolve(), folder), args.seed)
                measure(part, args, measured)
            except NotMeasured as e:
                measured.reason = str(e)
        print(measured, flush=True)
        results.append(measured)
        record.add(measured, sys.argv[1:])
    if any(measured.violations for measured in results):
        return 1
    return CANNOT_RUN if any(measured.reason for measured in results) else 0


if __name__ == "__main__":
    sys.exit(main())
