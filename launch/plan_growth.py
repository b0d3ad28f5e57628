#!/usr/bin/env python3
"""Growth of a run: tokens per second against ranks, and what limits it, from `upmoe plan`, as a table and a picture.

usage: .venv/bin/python launch/plan_growth.py RUN.yaml --machine h100-sxm [--out growth.png] [section.key=value ...]
The batch grows with the ranks (--sequences of each), the experts' ranks up to --most-ep. The table of docs/plan.md is
what this prints for the command above it (tests/launch/plan_command_test.py, which makes it anew with --write).
"""

# First: a key pressed while libraries load is heard.
from command_line import BadInput, BadUsage, ToolParser, missing_package, run_tool

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"compute": "#31688e", "calls": "#5f6b73", "exchange": "#d1603d", "reduction": "#35a16b", "bubble": "#c9a227",
         "imbalance": "#8e5ea2"}


def plan(args, world):
    words = [args.binary, "plan", args.run, "--world", str(world), "--machine", args.machine, "--json", *args.overrides,
             f"parallel.ep={min(world, args.most_ep)}", f"train.global_batch={world * args.sequences}"]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BadInput(f"{world} ranks: {done.stderr.strip()}")
    return json.loads(done.stdout)


def shares(time):
    """Of a step's time; waiting for the slowest rank is in what that one computes."""
    parts = {"compute": time["compute"] - time["calls"] - time["imbalance"], "calls": time["calls"],
             "exchange": time["exchange"], "reduction": time["reduction"], "bubble": time["bubble"] + time["stages"],
             "imbalance": time["imbalance"]}
    return {name: seconds / time["seconds"] for name, seconds in parts.items()}


def limits(plan):
    """The two largest parts of a step."""
    parts = sorted(shares(plan["time"]).items(), key=lambda part: -part[1])
    words = ", ".join(f"{name} {100 * share:.0f} %" for name, share in parts[:2])
    return words if plan["fits"] else words + "; does not fit"


def table(plans):
    rows = [f"| ranks of {plans[0]['machine']} | tokens/s | of each | largest parts of a step |",
            "|---:|---:|---:|---|"]
    rows += [f"| {p['world']:,} | {p['time']['tokens_per_s']:,.0f} | {p['time']['tokens_per_s_per_rank']:,.0f} | "
             f"{limits(p)} |" for p in plans]
    return "\n".join(rows)


def draw(plans, out):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as missing:
        raise BadUsage(missing_package(missing)) from None
    figure, (rate, parts) = plt.subplots(1, 2, figsize=(11, 4.2))
    worlds = [p["world"] for p in plans]
    tokens = [p["time"]["tokens_per_s"] for p in plans]
    rate.plot(worlds, tokens, color="#888888", linewidth=1.2, zorder=1)
    rate.plot(worlds, [tokens[0] / worlds[0] * w for w in worlds], color="#cccccc", linestyle="--",
              label="as one rank, times the ranks")
    for p in plans:
        limit = p["time"]["limit"]
        rate.scatter(p["world"], p["time"]["tokens_per_s"], color=PARTS[limit], s=60, zorder=2,
                     marker="o" if p["fits"] else "x")
        rate.annotate(f" {limit}{'' if p['fits'] else ', does not fit'}", (p["world"], p["time"]["tokens_per_s"]),
                      fontsize=8, va="top")
    rate.set(xscale="log", yscale="log", xlabel="ranks", ylabel="tokens/s", title="Growth, and what limits it")
    rate.legend(frameon=False, loc="upper left")
    below = [0.0] * len(plans)
    for name, colour in PARTS.items():
        heights = [shares(p["time"])[name] for p in plans]
        parts.bar([str(w) for w in worlds], heights, bottom=below, color=colour, label=name)
        below = [b + h for b, h in zip(below, heights)]
    parts.set(xlabel="ranks", ylabel="share of a step", title="What a step is made of", ylim=(0, 1))
    parts.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (rate, parts):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=150)


def main():
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run configuration (YAML)")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--machine", required=True, help="a file, or a name of configs/machines")
    parser.add_argument("--out", type=Path, help="a picture as well, .png or .svg")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    parser.add_argument("--sequences", type=int, default=16, help="of each rank in a step (default: 16)")
    parser.add_argument("--most-ep", type=int, default=8, help="parallel.ep at most (default: 8)")
    parser.add_argument("--binary", type=Path, default=ROOT / "build" / "release" / "upmoe")
    args = parser.parse_intermixed_args()
    plans = [plan(args, world) for world in args.ranks]
    print(table(plans))
    if args.out:
        draw(plans, args.out)


if __name__ == "__main__":
    sys.exit(run_tool("plan_growth", main))
