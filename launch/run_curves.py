"""Lines of runs against what they spent. Runs of one arm, which differ in their seed alone, are drawn as their mean
with the 95 % interval of it (Student's t).
"""

import math
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.transforms import offset_copy
from run_metrics import AXES, Run, smooth, title_of, values

matplotlib.use("Agg")

COLOURS = ["#31688e", "#d1603d", "#35a16b", "#8e5ea2", "#c9a227", "#5f6b73", "#c0487f", "#3aa6b9"]
AXES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training", "step": "step"}
STYLE = {"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
         "axes.edgecolor": "#888888", "axes.labelcolor": "#444444", "xtick.color": "#444444", "ytick.color": "#444444",
         "legend.frameon": False, "figure.facecolor": "white", "savefig.dpi": 150, "lines.linewidth": 1.8}
GRID = 200  # points of a mean over runs whose steps lie apart


@dataclass
class Group:
    """Runs that are one line: a single one, or all of an arm."""
    label: str
    colour: str
    runs: list[Run]
    banded: bool = True

    @property
    def title(self):
        return title_of(self.label) + (f" ({len(self.runs)} runs)" if len(self.runs) > 1 else "")


def palette(count):
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def mean_and_half(xs, ys):
    """Of several lines, over the part of the axis that all of them cover: x, mean, half of the 95 % interval."""
    same = all(len(x) == len(xs[0]) and np.array_equal(x, xs[0]) for x in xs)
    x = xs[0] if same else np.linspace(max(x[0] for x in xs), min(x[-1] for x in xs), GRID)
    finite = [(own[np.isfinite(y)], y[np.isfinite(y)]) for own, y in zip(xs, ys)]
    lines = np.array([np.interp(x, own, y) if len(y) else np.full(len(x), math.nan) for own, y in finite])
    if len(lines) < 2:
        return x, lines[0], np.zeros(len(x))
    from scipy import stats  # takes a second to load, and single runs do without
    spread = lines.std(axis=0, ddof=1) / math.sqrt(len(lines))
    return x, lines.mean(axis=0), stats.t.ppf(0.975, len(lines) - 1) * spread


def band(ax, xs, ys, colour, label, banded=True):
    """The mean of several lines, and its interval around it. What was drawn as the mean."""
    x, mean, half = mean_and_half(xs, ys)
    ax.plot(x, mean, color=colour, label=label)
    if banded:
        ax.fill_between(x, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
    return x, mean


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


def draw_lines(ax, groups, against, key, legend=lambda group: group.title):
    """A line for each group: of a single run what it logged and that smoothed, of several the mean of the smoothed."""
    shown = []
    for group in groups:
        xs = [run.x(run.steps, against) for run in group.runs]
        ys = [values(run.steps, key) for run in group.runs]
        lines = [smooth(y, len(y) // 40) for y in ys]
        if len(group.runs) == 1:
            ax.plot(xs[0], ys[0], color=group.colour, alpha=0.22, linewidth=0.8)
            ax.plot(xs[0], lines[0], color=group.colour, label=legend(group))
            shown.append(lines[0])
        else:
            shown.append(band(ax, xs, lines, group.colour, legend(group), group.banded)[1])
    return shown


def draw_loss(ax, groups, against):
    limit_to_bulk(ax, draw_lines(ax, groups, against, "loss"))
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


def draw_heldout(ax, groups, against):
    shown, ends = [], []
    for group in groups:
        runs = [run for run in group.runs if run.evals]
        xs, ys = [run.x(run.evals, against) for run in runs], [values(run.evals, "eval_loss") for run in runs]
        if not runs:
            continue
        if len(group.runs) == 1:
            x, y = xs[0], ys[0]
            ax.plot(x, y, color=group.colour, marker="o", markersize=4, label=group.title)
        else:
            x, y = band(ax, xs, ys, group.colour, group.title, group.banded)
        if math.isfinite(y[-1]):
            ends.append((x[-1], y[-1], group.colour))
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


def draw_throughput(ax, groups, against):
    def legend(group):
        rates = np.concatenate([values(run.steps, "tokens_per_s") for run in group.runs])
        return f"{group.title}: median {short(np.nanmedian(rates))}"

    draw_lines(ax, groups, against, "tokens_per_s", legend)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(lambda value, _: short(value))
    finish_axis(ax, against, "Throughput", "tokens per second, all ranks")
    ax.legend(loc="lower right")
