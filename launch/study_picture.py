"""The curves of a study as a picture, curves.png; apart from the rest because matplotlib takes a second to load."""

import math

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from run_curves import COLOURS, DASHES, FEWEST, STYLE, draw_line, mean_line, palette, short  # noqa: E402
from study_measures import NAMES  # noqa: E402

PANELS = [("tokens", False), ("flops", False), ("flops", True)]  # what is spent, and whether the source is charged
WIDTH, HEIGHT = 15, 4.8  # inches, without the legend
LEGEND_LINE = 0.26       # inches of a row of the legend
LETTERS = 150            # of a row of it


def columns(names):
    """Of the legend: as many as the longest name lets stand side by side."""
    return max(1, min(len(names), LETTERS // (max(map(len, names)) + 8)))


def draw_arms(ax, outcomes, axis, charged):
    """A line for each arm, in a colour and a dash that no other has."""
    lines = []
    for i, (arm, colour) in enumerate(zip(outcomes, palette(len(outcomes)))):
        curves = [o.curve(charged) for o in outcomes[arm]]
        lines.append(mean_line([c.spent[axis] for c in curves], [c.loss for c in curves]))
        draw_line(ax, lines[-1], colour, arm.replace("$", r"\$"),
                  linestyle=DASHES[i // len(COLOURS) % len(DASHES)])
    ax.set_xlabel(NAMES[axis] + (", sources charged" if charged else ""))
    ax.xaxis.set_major_formatter(lambda value, _: short(value))
    return lines


def limits_of(lines):
    """Of the losses: the first fall would flatten the rest. Intervals are seen whole at the end, which is compared."""
    heights, banded = [y for line in lines for y in line.heights], [line for line in lines if line.low is not None]
    ordinary = [loss[len(loss) // 5:] for loss in heights] + [line.high[-1:] for line in banded]
    bottoms = [line.low[len(line.low) // 5:] for line in banded]
    return min(map(np.min, [*heights, *bottoms])) - 0.05, max(map(np.max, ordinary)) + 0.05


def figure_of(study, outcomes):
    """With the legend below the axes: where curves fall from the left and bands are wide, no corner of them is free."""
    seeds, rows = len(next(iter(outcomes.values()))), math.ceil(len(outcomes) / columns(outcomes))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(WIDTH, HEIGHT + LEGEND_LINE * (rows + (seeds > 1))),
                                layout="constrained", sharey=True)
    lines = [draw_arms(ax, outcomes, *panel) for ax, panel in zip(axes, PANELS)]
    axes[0].set_ylim(*limits_of(lines[0]))
    axes[0].set_ylabel("held-out loss, nats per token")
    how = "mean and 95 % interval" if seeds >= FEWEST else "thin: each seed; thick: their mean"
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns(outcomes),
                  handlelength=3.5, title=how if seeds > 1 else None)
    figure.suptitle(f"{study.name}, size {study.size}, {seeds} seed{'s' if seeds > 1 else ''}")
    return figure


def draw_curves(folder, study, outcomes):
    with plt.rc_context(STYLE):
        figure = figure_of(study, outcomes)
        figure.savefig(folder / "curves.png", metadata={"Software": None})
        plt.close(figure)
    return folder / "curves.png"
