#!/usr/bin/env python3
"""Writes small conversations about sums as JSON lines, for trying a fine-tuning (docs/finetune.md).

Each line is {"messages": [{"role": ..., "content": ...}, ...]}, as data/tokenize.py --chat reads them. The same --seed
gives the same file; needs the Python standard library alone.
"""

import argparse
import json
import random
import sys

from command_line import ToolParser, run_tool

QUESTIONS = ("What is {a} plus {b}?", "Add {a} and {b}.", "How much are {a} and {b} together?")


def turns(draw):
    a, b = draw.randrange(50), draw.randrange(50)
    yield {"role": "user", "content": draw.choice(QUESTIONS).format(a=a, b=b)}
    yield {"role": "assistant", "content": f"{a} plus {b} is {a + b}."}


def talk(draw):
    messages = [{"role": "system", "content": "You add numbers."}] if draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 3)):
        messages += turns(draw)
    return {"messages": messages}


def main():
    parser = ToolParser(prog="make_talks.py", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="file to write, replaced if it exists")
    parser.add_argument("--talks", type=int, default=2000, metavar="N", help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="another one gives others (default %(default)s)")
    args = parser.parse_args()
    if args.talks < 1:
        parser.error("--talks: at least 1")
    draw = random.Random(args.seed)
    with open(args.out, "w", encoding="utf-8") as out:
        for _ in range(args.talks):
            out.write(json.dumps(talk(draw)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("make_talks", main))
