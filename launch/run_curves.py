"""Lines of runs against what they spent. Runs of one arm, which differ in their seed alone, are drawn as their mean
with the 95 % interval of it (Student's t); fewer than three as they are, beside their mean.
"""

import math
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.transforms import offset_copy
from run_metrics import AXES, Run, rolling_quantiles, smooth, title_of, values

matplotlib.use("Agg")

COLOURS = ["#31688e", "#d1603d", "#35a16b", "#8e5ea2", "#c9a227", "#5f6b73", "#c0487f", "#3aa6b9"]
STYLE = {"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
         "axes.edgecolor": "#888888", "axes.labelcolor": "#444444", "xtick.color": "#444444", "ytick.color": "#444444",
         "legend.frameon": False, "figure.facecolor": "white", "savefig.dpi": 150, "lines.linewidth": 1.8}
DASHES = ["-", "--", ":", "-."]
MARKS = {"marker": "o", "markersize": 4}
GRID = 200  # points of a mean over runs whose steps lie apart
FEWEST = 3  # runs of which an interval is drawn: that of two is nine deviations on each side, and covers all else


@dataclass
class Group:
    """Runs that are one line: a single one, or all of an arm."""
    label: str
    colour: str
    runs: list[Run]
    banded: bool = True

    @property
    def title(self):
        count = len(self.runs)
        how = "mean" if not self.banded else "thin, and their mean" if count < FEWEST else "mean and 95 % interval"
        return title_of(self.label) + (f" ({count} runs, {how})" if count > 1 else "")


@dataclass
class Line:
    """What is drawn for a group: of a single run what it logged and that smoothed, of several their mean and its
    interval, or they themselves.
    """
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    raw: tuple | None = None  # x and y as they were logged
    runs: list = field(default_factory=list)  # x and y of each

    @property
    def heights(self):
        """What an axis must have room for."""
        return [y for _, y in self.runs] or [self.y]


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
    from study_statistics import half_width  # brings scipy, which single runs do without
    return x, lines.mean(axis=0), half_width(lines.std(axis=0, ddof=1), len(lines))


def mean_line(xs, ys, banded=True):
    """The mean of several lines, and its interval around it; of fewer than FEWEST the lines beside it."""
    x, mean, half = mean_and_half(xs, ys)
    if not banded:
        return Line(x, mean)
    return Line(x, mean, runs=list(zip(xs, ys))) if len(xs) < FEWEST else Line(x, mean, mean - half, mean + half)


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


def bulk_limits(series):
    """The first steps fall from ln(vocabulary) and would flatten everything after them. None: as it comes."""
    tail = np.concatenate([y[len(y) // 20:] for y in series]) if series else np.array([])
    tail = tail[np.isfinite(tail)]
    if tail.size <= 2:
        return None
    low, high = tail.min(), np.quantile(tail, 0.99)
    pad = 0.06 * max(high - low, 1e-3)
    return low - pad, high + pad


def step_line(group, against, key):
    """Of what every step logs."""
    xs = [run.x(run.steps, against) for run in group.runs]
    ys = [values(run.steps, key) for run in group.runs]
    lines = [smooth(y, len(y) // 40) for y in ys]
    return Line(xs[0], lines[0], raw=(xs[0], ys[0])) if len(group.runs) == 1 else mean_line(xs, lines, group.banded)


def heldout_line(group, against, name=None):
    """Of all held-out sets together or of the one of that name. None without an evaluation."""
    runs = [(run, records) for run in group.runs if (records := run.of_set(name) if name else run.evals)]
    if not runs:
        return None
    xs, ys = [run.x(records, against) for run, records in runs], [values(records, "eval_loss") for _, records in runs]
    return Line(xs[0], ys[0]) if len(group.runs) == 1 else mean_line(xs, ys, group.banded)


def held_out_sets(groups):
    """The names of sets that runs were evaluated on one by one; of a single one, all there is to see is the whole."""
    names = list(dict.fromkeys(name for group in groups for run in group.runs for name in run.sets()))
    return names if len(names) > 1 else []


def heldout_limits(lines):
    return bulk_limits([y[1:] if len(y) > 2 and y[0] > 1.3 * y[-1] else y for line in lines for y in line.heights])


def throughput_line(group, against):
    """Medians, and of a single run the middle 80 % of the steps around each."""
    xs, medians = [], []
    for run in group.runs:
        rates = values(run.steps, "tokens_per_s")
        places, (low, median, high) = rolling_quantiles(rates, (0.1, 0.5, 0.9))
        xs.append(run.x(run.steps, against)[places])
        medians.append(median)
    if len(group.runs) > 1:
        return mean_line(xs, medians, group.banded)
    return Line(xs[0], medians[0], low, high)


def throughput_limits(groups):
    """From 0 to above what the steady runs reach: single steps beyond do not count."""
    rates = [values(run.steps, "tokens_per_s") for group in groups for run in group.runs]
    top = max((np.quantile(y[np.isfinite(y)], 0.95) for y in rates if np.isfinite(y).any()), default=0.0)
    return (0.0, 1.15 * top) if top > 0 else None


def draw_line(ax, line, colour, label, **style):
    if line.raw:
        ax.plot(*line.raw, color=colour, alpha=0.22, linewidth=0.8)
    for x, y in line.runs:
        ax.plot(x, y, color=colour, alpha=0.6, linewidth=0.8)
    ax.plot(line.x, line.y, color=colour, label=label, **style)
    if line.low is not None:
        ax.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)


def limit(ax, limits):
    if limits:
        ax.set_ylim(*limits)


def draw_legend(ax, groups, **style):
    """matplotlib looks for a corner that is free of lines. Of intervals it knows nothing: then names stand below."""
    if any(group.banded and len(group.runs) >= FEWEST for group in groups):
        style |= {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)} | ({"fontsize": 7} if len(groups) > 4 else {})
    ax.legend(**style)


def draw_loss(ax, groups, against):
    lines = [step_line(group, against, "loss") for group in groups]
    for group, line in zip(groups, lines):
        draw_line(ax, line, group.colour, group.title)
    limit(ax, bulk_limits([y for line in lines for y in line.heights]))
    finish_axis(ax, against, "Training loss", "cross-entropy, nats per token")
    draw_legend(ax, groups)


def label_ends(ax, ends):
    """The last value of each line beside its end, moved apart where two would cover each other. Where other lines go
    on, the right side is theirs; what lies below on the left a falling loss leaves free.
    """
    step = 0.045 * (ax.get_ylim()[1] - ax.get_ylim()[0])  # a line of text
    last = max((x for x, _, _ in ends), default=0.0)
    rising = sorted(ends, key=lambda end: end[1])

    def write(found, up, ha, va, shift):
        place = -up * np.inf
        for x, y, colour in found:
            place = up * max(up * y, up * place + step)
            ax.annotate(f"{y:.3f}", (x, y), xytext=(x, place), va=va, ha=ha, color=colour, fontsize=9, xycoords="data",
                        textcoords=offset_copy(ax.transData, ax.figure, *shift, units="points"))

    write([end for end in rising if end[0] >= 0.95 * last], 1, "left", "center", (5, 0))
    write([end for end in reversed(rising) if end[0] < 0.95 * last], -1, "right", "top", (-3, -5))


def draw_heldout(ax, groups, against):
    drawn = [(group, line) for group in groups if (line := heldout_line(group, against))]
    for group, line in drawn:
        draw_line(ax, line, group.colour, group.title, **MARKS if len(group.runs) == 1 else {})
    finish_axis(ax, against, "Held-out loss", "cross-entropy, nats per token")
    if drawn:
        limit(ax, heldout_limits([line for _, line in drawn]))
        ax.margins(x=0.1)
        label_ends(ax, [(line.x[-1], line.y[-1], group.colour) for group, line in drawn if math.isfinite(line.y[-1])])
        draw_legend(ax, groups)
    else:
        ax.text(0.5, 0.5, "no held-out evaluation in these runs", ha="center", va="center", transform=ax.transAxes,
                color="#888888")


def draw_sets(ax, groups, against):
    """A line of each group for each held-out set that has a name: colours are the groups', dashes the sets'."""
    drawn = []
    for i, name in enumerate(held_out_sets(groups)):
        for group in groups:
            if line := heldout_line(group, against, name):
                label = f"{group.title}: {title_of(name)}" if len(groups) > 1 else title_of(name)
                draw_line(ax, line, group.colour, label, linestyle=DASHES[i % len(DASHES)], **MARKS)
                drawn.append((line, group.colour))
    finish_axis(ax, against, "Held-out loss, set by set", "cross-entropy, nats per token")
    limit(ax, heldout_limits([line for line, _ in drawn]))
    ax.margins(x=0.1)
    label_ends(ax, [(line.x[-1], line.y[-1], colour) for line, colour in drawn if math.isfinite(line.y[-1])])
    draw_legend(ax, groups, fontsize=8, ncols=2, handlelength=3.5)


def median_rate(group):
    return np.nanmedian(np.concatenate([values(run.steps, "tokens_per_s") for run in group.runs]))


def draw_throughput(ax, groups, against):
    for group in groups:
        draw_line(ax, throughput_line(group, against), group.colour,
                  f"{group.title}: median {short(median_rate(group))}")
    limit(ax, throughput_limits(groups))
    ax.yaxis.set_major_formatter(lambda value, _: short(value))
    finish_axis(ax, against, "Throughput, median and middle 80 % of the steps", "tokens per second, all ranks")
    draw_legend(ax, groups, loc="lower right")
