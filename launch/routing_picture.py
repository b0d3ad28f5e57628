#!/usr/bin/env python3
"""Draws what `upmoe inspect --routing` counted: which experts fire for which source, place in the sequence and class of
token, and how often neighbouring tokens choose the same ones. Started by it.
"""

from command_line import BadInput, ToolParser, display, end_without_package, missing_package, run_tool

import argparse
import json
import sys
from pathlib import Path

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from run_curves import STYLE
    from run_metrics import title_of
except ImportError as missing:
    end_without_package("upmoe", missing_package(missing))

SHOWN = 4   # layers, evenly chosen: more do not fit on a page, and all are in the JSON
REACH = 2.0  # of the colours: 2^-2 to 2^2 times the expert's load


def lift(counts):
    """log2 of how much more an expert gets of a group's choices than of all; a group or an expert without any: NaN."""
    counts = np.array(counts, dtype=float)
    with np.errstate(all="ignore"):
        share, load = counts / counts.sum(axis=1, keepdims=True), counts.sum(axis=0) / counts.sum()
        found = np.log2(share / load)
    found[np.isneginf(found)] = -REACH
    found[:, load == 0] = np.nan
    return found


def groups_of(record):
    """What the groups are by, the key of their counts, and what each group is."""
    yield "source", "by_source", [title_of(source["name"]) for source in record["sources"]]
    yield "position", "by_position", [f"{part['first']}-{part['last']}" for part in record["positions"]]
    yield "class", "by_class", [title_of(one["name"]) for one in record["classes"]]


def draw_lift(ax, layer, key, names, bits):
    image = ax.imshow(np.clip(lift(layer[key]), -REACH, REACH), aspect="auto", cmap="PuOr_r", vmin=-REACH, vmax=REACH,
                      interpolation="nearest")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.grid(False)
    ax.set_facecolor("#dddddd")  # of what got nothing at all
    ax.set_title(f"layer {layer['layer']}: {bits:.3f} bits", fontsize=9)
    return image


def draw_repeats(ax, record):
    layers = [layer["layer"] for layer in record["layers"]]
    for key, words, colour in (("first", "first choice", "#31688e"), ("overlap", "all choices", "#d1603d")):
        for suffix, style, of in (("", "o-", "the same"), ("_by_chance", "--", "by the loads alone")):
            pairs = [[one["pairs"] for one in layer["repeats"]] for layer in record["layers"]]
            found = [[one[key + suffix] for one in layer["repeats"]] for layer in record["layers"]]
            mean = [np.average(row, weights=weight) if sum(weight) else np.nan for row, weight in zip(found, pairs)]
            ax.plot(layers, mean, style, color=colour, markersize=4, label=f"{words}, {of}")
    ax.set_ylim(bottom=0)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("layer")
    ax.set_ylabel("share of neighbours")
    ax.set_title("Neighbouring tokens with the same experts")
    ax.legend(fontsize=8, ncols=2)


def draw(record, path):
    layers = record["layers"]
    shown = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, min(SHOWN, len(layers))).round().astype(int))]
    groups = list(groups_of(record))
    heights = [2.2] * len(shown) + [3.0]
    figure = plt.figure(figsize=(15, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(shown) + 1, len(groups), height_ratios=heights)
    for row, layer in enumerate(shown):
        for column, (what, key, names) in enumerate(groups):
            ax = figure.add_subplot(grid[row, column])
            image = draw_lift(ax, layer, key, names, layer["bits"][what])
            if row == len(shown) - 1:
                ax.set_xlabel(f"expert, by {what}")
    bar = figure.colorbar(image, ax=figure.axes, pad=0.01, fraction=0.015, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4 or less", "1/2", "as all", "2 x", "4 x or more"])
    draw_repeats(figure.add_subplot(grid[len(shown), :]), record)
    figure.suptitle(f"Experts' share of a group's choices beside their share of all: {title_of(record['model'])}\n"
                    f"classes by {record['classes_by']}", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def main():
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=Path, help="the JSON of upmoe inspect --routing --json")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    try:
        record = json.loads(args.counts.read_bytes())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or record.get("kind") != "routing":
        raise BadInput(f"{display(args.counts)}: not what upmoe inspect --routing --json writes")
    with plt.rc_context(STYLE):
        draw(record, args.picture)


if __name__ == "__main__":
    sys.exit(run_tool("upmoe", main))
