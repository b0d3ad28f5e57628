#!/usr/bin/env python3
"""Pictures of training runs: loss, held-out loss, throughput and expert load, as PNG and one self-contained HTML page.

Reads RUN_DIR/metrics.jsonl. Several runs are laid over each other. Usually started as `upmoe report`.
"""

from command_line import BadInput, display, run_tool  # first: a key pressed while libraries load is heard

import argparse
import base64
import html
import json
import math
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.transforms import offset_copy
except ImportError as missing:
    sys.exit(f"upmoe: error: {sys.executable} cannot import {missing.name}, which the pictures need; run "
             "launch/setup.sh, or set UPMOE_PYTHON to a Python that has the packages of launch/requirements.txt")

COLOURS = ["#31688e", "#d1603d", "#35a16b", "#8e5ea2", "#c9a227", "#5f6b73", "#c0487f", "#3aa6b9"]
AXES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training", "step": "step"}
STYLE = {"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
         "axes.edgecolor": "#888888", "axes.labelcolor": "#444444", "xtick.color": "#444444", "ytick.color": "#444444",
         "legend.frameon": False, "figure.facecolor": "white", "savefig.dpi": 150, "lines.linewidth": 1.8}


@dataclass
class Run:
    path: Path
    label: str
    colour: str
    steps: list = field(default_factory=list)  # training records
    evals: list = field(default_factory=list)  # held-out records
    offset: float = 0.0                        # where this run starts on the horizontal axis

    def x(self, records, against):
        if against in ("tokens", "step"):
            return np.array([r[against] for r in records], dtype=float) + self.offset
        ends = np.array([r["step"] for r in self.steps], dtype=float)
        spent = np.cumsum([cost_of(self, r, against) * gap for r, gap in zip(self.steps, np.diff(ends, prepend=0.0))])
        return np.interp([r["step"] for r in records], np.insert(ends, 0, 0.0), np.insert(spent, 0, 0.0)) + self.offset

    @property
    def title(self):
        return title_of(self.label)

    def loads(self):
        return [(r["step"], np.array(r["expert_load"], dtype=float)) for r in self.steps if r.get("expert_load")]


def cost_of(run, record, against):
    """Seconds or FLOPs of one step. Records may be several steps apart; each stands for those since the last."""
    if against == "seconds":
        return record["seconds"]
    if "flops" not in record or "ranks" not in record:
        raise BadInput(f"{display(run.path)}: its metrics carry no flops or no ranks; use --against tokens, seconds or "
                       "step")
    return record["flops"] * record["ranks"]


LARGEST = 1e100  # what a count or a time may be, so that sums and axes stay finite


def number(record, key, required=False, gap=False):
    """A finite number that is not negative; with `gap` also null, NaN and infinity, as of a step that went wrong."""
    if key not in record and not required:
        return
    value = record[key]
    if gap and (value is None or isinstance(value, float) and not math.isfinite(value)):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise ValueError(f"{key} is {json.dumps(value)[:40]}, expected a number")
    if value < 0 and not gap:
        raise ValueError(f"{key} is {value}, expected no negative number")


def check_load(load):
    """Layers by experts, each row of one length."""
    rows = load if isinstance(load, list) else [None]
    if not rows or not all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows):
        raise ValueError("expert_load is not a table of layers by experts")
    for row in rows:
        for value in row:
            number({"expert_load": value}, "expert_load")


def checked(record):
    """A record of metrics.jsonl whose values are what the pictures take them for."""
    if not isinstance(record, dict):
        raise ValueError("expected an object")
    held_out = record.get("kind") == "eval"
    needed = ("step", "tokens") + (("eval_loss",) if held_out else ("loss", "seconds", "tokens_per_s"))
    missing = [key for key in needed if key not in record]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    for key in ("step", "tokens", "seconds", "tokens_per_s"):
        number(record, key, required=key in needed)
    for key in ("flops", "ranks"):
        number(record, key)
    for key in ("loss", "eval_loss", "grad_norm", "mfu"):
        number(record, key, gap=True)
    if record.get("expert_load"):
        check_load(record["expert_load"])
    return record


def read_run(path, label, colour):
    run, file = Run(path, label, colour), path / "metrics.jsonl"
    if not file.is_file():
        raise BadInput(f"{display(file)}: not found; give a run directory of `upmoe train`")
    lines = file.read_bytes().split(b"\n")
    shape = None
    for place, line in enumerate(lines, 1):
        if place == len(lines) and not line:
            break
        try:
            record = checked(json.loads(line))
            load = record.get("expert_load")
            if load and shape not in (None, (len(load), len(load[0]))):
                raise ValueError("expert_load has another shape than before")
            shape = (len(load), len(load[0])) if load else shape
        except (ValueError, RecursionError) as problem:
            if place == len(lines) and not line.endswith(b"}"):
                continue  # the run is still writing it
            words = " ".join(str(problem).split())
            raise BadInput(f"{display(file)}:{place}: not a metrics record ({words})") from None
        (run.evals if record.get("kind") == "eval" else run.steps).append(record)
    if not run.steps:
        raise BadInput(f"{display(file)}: holds no training step yet")
    return run


def title_of(name):
    """A name as matplotlib draws it: no formulas, no lines of its own, and in the legend also after an underscore."""
    text = " ".join(display(name).split())
    text = text if len(text) <= 60 else text[:59] + "\u2026"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def values(records, key):
    return np.array([math.nan if r.get(key) is None else r[key] for r in records], dtype=float)


def smooth(y, width):
    """Mean over a window that shrinks at both ends; gaps (non-finite steps) stay out of it."""
    good = np.isfinite(y)
    ones, filled = good.astype(float), np.where(good, y, 0.0)
    kernel = np.ones(max(1, width))
    count = np.convolve(ones, kernel, "same")
    return np.where(count > 0, np.convolve(filled, kernel, "same") / np.maximum(count, 1), math.nan)


def short(number):
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:.3g}"


def finish_axis(ax, against, title, ylabel):
    ax.set_title(title)
    ax.set_xlabel(AXES[against])
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_formatter(lambda value, _: short(value))
    ax.margins(x=0.02)


def limit_to_bulk(ax, series):
    """The first steps fall from ln(vocabulary) and would flatten everything after them."""
    tail = np.concatenate([y[len(y) // 20:] for y in series])
    tail = tail[np.isfinite(tail)]
    if tail.size > 2:
        low, high = tail.min(), np.quantile(tail, 0.99)
        pad = 0.06 * max(high - low, 1e-3)
        ax.set_ylim(low - pad, high + pad)


def draw_loss(ax, runs, against):
    shown = []
    for run in runs:
        x, y = run.x(run.steps, against), values(run.steps, "loss")
        line = smooth(y, len(y) // 40)
        ax.plot(x, y, color=run.colour, alpha=0.22, linewidth=0.8)
        ax.plot(x, line, color=run.colour, label=run.title)
        shown.append(line)
    limit_to_bulk(ax, shown)
    finish_axis(ax, against, "Training loss", "cross-entropy, nats per token")
    ax.legend()


def label_ends(ax, ends):
    """The last value of each line beside its end, moved apart where two would cover each other."""
    step = 0.045 * (ax.get_ylim()[1] - ax.get_ylim()[0])  # a line of text
    place = -np.inf
    for x, y, colour in sorted(ends, key=lambda end: end[1]):
        place = max(y, place + step)
        ax.annotate(f"{y:.3f}", (x, y), xytext=(x, place), va="center", color=colour, fontsize=9,
                    xycoords="data", textcoords=offset_copy(ax.transData, ax.figure, x=5, units="points"))


def draw_heldout(ax, runs, against):
    shown, ends = [], []
    for run in runs:
        if run.evals:
            x, y = run.x(run.evals, against), values(run.evals, "eval_loss")
            ax.plot(x, y, color=run.colour, marker="o", markersize=4, label=run.title)
            if math.isfinite(y[-1]):
                ends.append((x[-1], y[-1], run.colour))
            shown.append(y)
    finish_axis(ax, against, "Held-out loss", "cross-entropy, nats per token")
    if shown:
        limit_to_bulk(ax, [y[1:] if len(y) > 2 and y[0] > 1.3 * y[-1] else y for y in shown])
        ax.margins(x=0.1)
        label_ends(ax, ends)
        ax.legend()
    else:
        ax.text(0.5, 0.5, "no held-out evaluation in these runs", ha="center", va="center", transform=ax.transAxes,
                color="#888888")


def draw_throughput(ax, runs, against):
    for run in runs:
        y = values(run.steps, "tokens_per_s")
        ax.plot(run.x(run.steps, against), y, color=run.colour, alpha=0.22, linewidth=0.8)
        ax.plot(run.x(run.steps, against), smooth(y, len(y) // 40), color=run.colour,
                label=f"{run.title}: median {short(np.nanmedian(y))}")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(lambda value, _: short(value))
    finish_axis(ax, against, "Throughput", "tokens per second, all ranks")
    ax.legend(loc="lower right")


def draw_load_map(ax, run):
    """Layers by experts, mean over the last tenth of the run; 1 is a fair share."""
    loads = [load for _, load in run.loads()]
    recent = np.mean(loads[-max(1, len(loads) // 10):], axis=0)
    relative = recent * recent.shape[1]
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


def draw_overview(folder, runs, against):
    figure, axes = plt.subplots(2, 2, figsize=(12, 7.6), layout="constrained")
    draw_loss(axes[0, 0], runs, against)
    draw_heldout(axes[0, 1], runs, against)
    draw_throughput(axes[1, 0], runs, against)
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


def draw_all(folder, runs, against):
    names = [draw_overview(folder, runs, against)]
    for name, draw in (("loss", draw_loss), ("heldout_loss", draw_heldout), ("throughput", draw_throughput)):
        names.append(save(folder, f"{name}.png", (9, 4.8), lambda ax, draw=draw: draw(ax, runs, against)))
    for i, run in enumerate(run for run in runs if run.loads()):
        height = min(40.0, 1.6 + 0.35 * run.loads()[-1][1].shape[0])
        names.append(save(folder, f"expert_load_{i}.png", (11, height), lambda ax, run=run: draw_load_map(ax, run)))
        names.append(save(folder, f"expert_load_history_{i}.png", (9, 4),
                          lambda ax, run=run: draw_load_history(ax, run, against)))
    return names


def summary_rows(runs):
    for run in runs:
        last = run.steps[-1]
        mfu = [r["mfu"] for r in run.steps if r.get("mfu") is not None]
        gaps = np.diff([r["step"] for r in run.steps], prepend=0)
        yield [run.label, f"{last['step']:,}", short(last["tokens"]),
               f"{smooth(values(run.steps, 'loss'), len(run.steps) // 40)[-1]:.4f}",
               f"{values(run.evals, 'eval_loss')[-1]:.4f}" if run.evals else "-",
               short(median(r["tokens_per_s"] for r in run.steps)), f"{100 * median(mfu):.1f} %" if mfu else "-",
               f"{sum(r['seconds'] * gap for r, gap in zip(run.steps, gaps)):,.0f} s"]


def write_page(folder, runs, pictures):
    head = ["run", "steps", "tokens", "training loss", "held-out loss", "tokens/s", "MFU", "time in steps"]
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                   for row in summary_rows(runs))
    images = "".join(
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,'
        f'{base64.b64encode((folder / name).read_bytes()).decode()}">' for name in pictures)
    configs = "".join(
        f"<details><summary>{html.escape(display(run.path / 'config.yaml'))}</summary><pre>"
        f"{html.escape((run.path / 'config.yaml').read_text(encoding='utf-8', errors='replace'))}</pre></details>"
        for run in runs if (run.path / "config.yaml").is_file())
    title = "upmoe: " + ", ".join(run.label for run in runs)
    page = folder / "report.html"
    page.write_text(f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .3rem .9rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} th {{ border-bottom: 2px solid #888 }}
tr + tr td {{ border-top: 1px solid #e6e6e6 }} img {{ max-width: 100%; display: block; margin: 1.5rem 0 }}
pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto }}
</style>
<h1>{html.escape(title)}</h1>
<table><tr>{"".join(f"<th>{cell}</th>" for cell in head)}</tr>{rows}</table>
{images}
<h2>Configurations</h2>
{configs or "<p>none found</p>"}
</html>
""", encoding="utf-8")
    return page


def read_runs(paths, labels, continued, against):
    if labels and len(labels) != len(paths):
        print(f"upmoe: error: {len(labels)} labels for {len(paths)} runs; give --label once per run", file=sys.stderr)
        raise SystemExit(2)
    names = [display(name) for name in labels or [path.resolve().name for path in paths]]
    runs = [read_run(path, name, COLOURS[i % len(COLOURS)]) for i, (path, name) in enumerate(zip(paths, names))]
    if continued:
        end = runs[0].x(runs[0].steps, against)[-1]
        for run in runs[1:]:
            run.offset = end
    return runs


def main():
    parser = argparse.ArgumentParser(prog="upmoe report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="folder of the pictures and the page (default: RUN_DIR/report)")
    parser.add_argument("--against", choices=AXES, default="tokens", help="horizontal axis (default: tokens)")
    parser.add_argument("--label", action="append", help="name of a run, once per RUN_DIR (default: its folder's name)")
    parser.add_argument("--continued", action="store_true",
                        help="the first run is where the others started: draw them from its end on")
    args = parser.parse_args()
    runs = read_runs(args.runs, args.label, args.continued, args.against)
    folder = args.out or args.runs[0] / "report"
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the font lacks, windows without a finite value
        pictures = draw_all(folder, runs, args.against)
    page = write_page(folder, runs, pictures)
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(page) + b"\n")


if __name__ == "__main__":
    sys.exit(run_tool("upmoe", main))
