#!/usr/bin/env python3
"""Training runs: what they were, and loss, held-out loss, throughput and expert load, as PNG and one self-contained
HTML page with curves to read values off.

Reads metrics.jsonl, starts.jsonl and config.yaml of each RUN_DIR. Several runs are laid over each other. Usually
started as `upmoe report`.
"""

# First: a key pressed while libraries load is heard.
from command_line import ToolParser, display, end_without_package, missing_package, run_tool

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from report_page import write_page
    from run_curves import (STYLE, Group, draw_heldout, draw_loss, draw_sets, draw_throughput, finish_axis,
                            held_out_sets, palette)
    from run_metrics import AXES, axes_of, read_run, values
except ImportError as missing:
    end_without_package("upmoe", missing_package(missing))


def draw_load_map(ax, run):
    """Layers by experts, mean over the last tenth of the run; 1 is a fair share."""
    relative = run.load_at_end()
    top = max(2.0, min(4.0, float(relative.max())))
    image = ax.imshow(relative, aspect="auto", cmap="viridis", vmin=0.0, vmax=top, interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, extend="max" if relative.max() > top else "neither")
    bar.set_label("load, 1 = fair share")
    bar.outline.set_visible(False)
    ax.grid(False)
    ax.set_title(f"Expert load at the end: {run.title}")
    ax.set_xlabel("expert")
    ax.set_ylabel("MoE layer")
    ax.set_yticks(range(relative.shape[0]))


def draw_load_history(ax, run, against):
    records = [r for r in run.steps if r.get("expert_load")]
    relative = np.array([np.array(r["expert_load"]) * len(r["expert_load"][0]) for r in records])
    x = run.x(records, against)
    ax.fill_between(x, relative.min(axis=(1, 2)), relative.max(axis=(1, 2)), color=run.colour, alpha=0.12,
                    linewidth=0, label="all experts")
    ax.fill_between(x, np.quantile(relative, 0.1, axis=(1, 2)), np.quantile(relative, 0.9, axis=(1, 2)),
                    color=run.colour, alpha=0.35, linewidth=0, label="middle 80 %")
    ax.axhline(1.0, color="#444444", linewidth=1, linestyle="--", label="fair share")
    ax.set_ylim(bottom=0)
    finish_axis(ax, against, f"Spread of the expert load: {run.title}", "load, 1 = fair share")
    ax.legend()


def save(folder, name, size, draw):
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    draw(ax)
    figure.savefig(folder / name)
    plt.close(figure)
    return name


def draw_overview(folder, groups, against):
    figure, axes = plt.subplots(2, 2, figsize=(12, 7.6), layout="constrained")
    draw_loss(axes[0, 0], groups, against)
    draw_heldout(axes[0, 1], groups, against)
    draw_throughput(axes[1, 0], groups, against)
    runs = [run for group in groups for run in group.runs]
    moe = [run for run in runs if run.loads()]
    if moe:
        draw_load_map(axes[1, 1], moe[-1])
    else:
        for run in runs:
            axes[1, 1].plot(run.x(run.steps, against), values(run.steps, "grad_norm"), color=run.colour)
        finish_axis(axes[1, 1], against, "Gradient norm", "before clipping")
        axes[1, 1].set_yscale("log")
    figure.savefig(folder / "overview.png")
    plt.close(figure)
    return "overview.png"


def draw_all(folder, groups, against):
    names = [draw_overview(folder, groups, against)]
    by_set = [("heldout_sets", draw_sets)] if held_out_sets(groups) else []
    for name, draw in (("loss", draw_loss), ("heldout_loss", draw_heldout), *by_set, ("throughput", draw_throughput)):
        names.append(save(folder, f"{name}.png", (9, 4.8), lambda ax, draw=draw: draw(ax, groups, against)))
    runs = [run for group in groups for run in group.runs]
    for i, run in enumerate(run for run in runs if run.loads()):
        height = min(40.0, 1.6 + 0.35 * run.loads()[-1][1].shape[0])
        names.append(save(folder, f"expert_load_{i}.png", (11, height), lambda ax, run=run: draw_load_map(ax, run)))
        names.append(save(folder, f"expert_load_history_{i}.png", (9, 4),
                          lambda ax, run=run: draw_load_history(ax, run, against)))
    return names


def of_study(path, key):
    """What a study said of a run that it made: its arm or its seed. None of any other run."""
    try:
        return json.loads((path / "study.json").read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def arm_of(path):
    """The folder's name of a run that no study made."""
    arm = of_study(path, "arm")
    return arm if arm and isinstance(arm, str) else path.resolve().name


def told_apart(paths, names):
    """Of runs of one name: with their seed, or their folder, whatever they do not share."""
    own = list(names)
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        places = [i for i, other in enumerate(names) if other == name]
        seeds = [of_study(paths[i], "seed") for i in places]
        ways = [[f"seed {seed}" for seed in seeds] if None not in seeds else [],
                [display(paths[i].resolve().name) for i in places], [display(paths[i]) for i in places]]
        for i, words in zip(places, next((way for way in ways if len(set(way)) == len(places)), ways[-1])):
            own[i] = f"{name}, {words}"
    return own


def folder_names(paths):
    """Each run's folder, behind as many of those above it as tell runs in folders of one name apart."""
    names, parts = [], [path.resolve().parts for path in paths]
    for own in parts:
        length = 1
        while any(other != own and other[-length:] == own[-length:] for other in parts):
            length += 1
        names.append(str(Path(*own[-length:])))
    return names


def read_groups(args):
    """The runs, each alone or those of one name together."""
    paths, labels, grouped = args.runs, args.label, args.group == "arm"
    wrong = (f"{len(labels)} labels for {len(paths)} runs; give --label once per run"
             if labels and len(labels) != len(paths) else
             "--band needs lines of several runs: --group arm" if args.band and not grouped else "")
    if wrong:
        print(f"upmoe: error: {wrong}", file=sys.stderr)
        raise SystemExit(2)
    names = [display(name) for name in labels or ([arm_of(p) for p in paths] if grouped else folder_names(paths))]
    lines = list(dict.fromkeys(names)) if grouped else range(len(names))
    colours = dict(zip(lines, palette(len(lines))))
    groups, own = {}, told_apart(paths, names) if grouped else names
    for i, (path, name) in enumerate(zip(paths, names)):
        line = name if grouped else i
        group = groups.setdefault(line, Group(name, colours[line], [], args.band != "none"))
        group.runs.append(read_run(path, own[i], colours[line]))
    runs = [run for group in groups.values() for run in group.runs]
    if args.continued:
        first = groups[lines[0]].runs[0]
        ends = {axis: float(first.x(first.steps, axis)[-1]) for axis in axes_of(runs)}
        for run in runs:
            run.starts = {} if run is first else ends
    return list(groups.values())


def main():
    parser = ToolParser(prog="upmoe report", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="folder of the pictures and the page (default: RUN_DIR/report)")
    parser.add_argument("--against", choices=AXES, default="tokens",
                        help="horizontal axis of the pictures, and the page's at first (default: tokens)")
    parser.add_argument("--label", action="append", help="name of a run, once per RUN_DIR (default: its folder's name)")
    parser.add_argument("--continued", action="store_true",
                        help="the first run is where the others started: draw them from its end on")
    parser.add_argument("--group", choices=("run", "arm"), default="run",
                        help="arm: one line for the runs of one label, or of one arm of a study (default: run)")
    parser.add_argument("--band", choices=("ci", "none"),
                        help="with --group arm: ci, the 95 %% interval of the mean around it (default), or none")
    args = parser.parse_args()
    groups = read_groups(args)
    folder = args.out or args.runs[0] / "report"
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the font lacks, windows without a finite value
        pictures = draw_all(folder, groups, args.against)
        page = write_page(folder, groups, args.against, pictures)
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(page) + b"\n")


if __name__ == "__main__":
    sys.exit(run_tool("upmoe", main))
