#!/usr/bin/env python3
"""What several seeds of launch/quickstart.sh say together: the mixture's held-out loss less that of the dense model
that goes on, of each seed and as the mean with its 95 % interval.

usage: .venv/bin/python launch/quickstart_seeds.py FOLDER FOLDER...    such as runs/quickstart runs/quickstart_seed2
"""

import argparse
import json
import sys
from pathlib import Path

from command_line import BadInput, ToolParser, display, end_without_package, own_python, run_tool

try:
    from study_statistics import interval
except ImportError as missing:
    end_without_package("quickstart_seeds", own_python(missing))

READINGS = {"difference_at_equal_tokens": "for as many tokens", "difference_at_equal_flops": "for as many FLOPs"}


def result_of(folder):
    file = folder / "result.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: float(found[key]) for key in (*READINGS, "unused_experts")}
    except OSError as problem:
        raise BadInput(f"{display(file)}: {problem.strerror}; launch/quickstart.sh leaves it at its "
                       "end, without --brief") from None
    except (KeyError, TypeError, ValueError) as problem:
        raise BadInput(f"{display(file)}: not the result of a quickstart ({problem})") from None


def settings_of(folder):
    """What the run was without its seed, and that."""
    file = folder / "settings"
    try:
        return file.read_text(encoding="utf-8").strip().rpartition(" seed ")[::2]
    except OSError as problem:
        raise BadInput(f"{display(file)}: {problem.strerror}") from None


def main():
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="two or more")
    args = parser.parse_args()
    if len(args.folders) < 2 or len({folder.resolve() for folder in args.folders}) < len(args.folders):
        parser.error("give two or more different folders, each of one seed")
    settings, seeds = zip(*map(settings_of, args.folders), strict=True)
    if len(set(settings)) > 1:
        raise BadInput("these runs differ in more than their seed (see the file settings in each); start them alike")
    if len(set(seeds)) < len(seeds):
        raise BadInput(f"these runs are of the seeds {', '.join(seeds)}; the same one again says nothing new")
    results = [result_of(folder) for folder in args.folders]
    for folder, result in zip(args.folders, results, strict=True):
        print(f"{display(folder)}: " + ", ".join(f"{words} {result[key]:+.4f}" for key, words in READINGS.items()) +
              f", dead experts {result['unused_experts']:.0f}")
    for key, words in READINGS.items():
        found = interval([result[key] for result in results])
        print(f"MoE against dense continued {words}: {found.mean:+.4f} nats per token, 95 % interval "
              f"{found.low:+.4f} to {found.high:+.4f} ({found.pairs} seeds)")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("quickstart_seeds", main))
