#!/usr/bin/env python3
"""Growth of a run as a picture: tokens per second against ranks, and what limits it, from `upmoe plan`.

usage: .venv/bin/python launch/plan_growth.py RUN.yaml --machine h100-sxm --out growth.png [section.key=value ...]
The batch grows with the ranks (--sequences of each), the experts' ranks up to --most-ep.
"""

from command_line import BadInput, missing_package, run_tool  # first: a key pressed while libraries load is heard

import argparse
import json
import subprocess
import sys
from pathlib import Path

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError as missing:
    sys.exit(f"upmoe: error: {missing_package(missing)}")

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


def draw(plans, out):
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run configuration (YAML)")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--machine", required=True, help="a file, or a name of configs/machines")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    parser.add_argument("--sequences", type=int, default=16, help="of each rank in a step (default: 16)")
    parser.add_argument("--most-ep", type=int, default=8, help="parallel.ep at most (default: 8)")
    parser.add_argument("--binary", type=Path, default=ROOT / "build" / "release" / "upmoe")
    args = parser.parse_intermixed_args()
    plans = [plan(args, world) for world in args.ranks]
    for p in plans:
        time = p["time"]
        print(f"{p['world']:6} ranks {time['tokens_per_s']:14.0f} tokens/s "
              f"{time['tokens_per_s_per_rank']:10.0f} of each  {time['limit']}{'' if p['fits'] else ', does not fit'}")
    draw(plans, args.out)
    print(args.out)


if __name__ == "__main__":
    sys.exit(run_tool("plan_growth", main))
