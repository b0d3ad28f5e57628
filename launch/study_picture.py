"""The curves of a study as a picture, curves.png; apart from the rest because matplotlib takes a second to load."""

import math

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from run_curves import COLOURS, DASHES, FEWEST, STYLE, draw_line, mean_line, palette, short  # noqa: E402
from study_measures import NAMES  # noqa: E402

PANELS = [("tokens", False), ("flops", False), ("flops", True)]  # what is spent, and whether the source is charged
WIDTH, HEIGHT = 20, 4.8  # inches, without the legend
LEGEND_LINE = 0.26       # inches of a row of the legend
LETTERS = 200            # of a row of it
MOST_BANDED = 6          # arms; the bands of more hide each other's lines, and the table has the intervals
FAR = 10                 # times as far from the reference as arms are in the middle


def columns(names):
    """Of the legend: as many as the longest name lets stand side by side."""
    return max(1, min(len(names), LETTERS // (max(map(len, names)) + 8)))


def banded(outcomes):
    return len(outcomes) <= MOST_BANDED


def draw_arm(ax, line, outcomes, arm):
    """In a colour and a dash that no other arm has."""
    i = list(outcomes).index(arm)
    draw_line(ax, line, palette(len(outcomes))[i], arm.replace("$", r"\$"),
              linestyle=DASHES[i // len(COLOURS) % len(DASHES)])


def draw_arms(ax, outcomes, axis, charged):
    lines = []
    for arm in outcomes:
        curves = [o.curve(charged) for o in outcomes[arm]]
        lines.append(mean_line([c.spent[axis] for c in curves], [c.loss for c in curves], banded(outcomes)))
        draw_arm(ax, lines[-1], outcomes, arm)
    ax.set_xlabel(NAMES[axis] + (", sources charged" if charged else ""))
    ax.xaxis.set_major_formatter(lambda value, _: short(value))
    return lines


def limits_of(lines, margin, beginning=0.2):
    """Of the losses, with a margin of that share: what happens in the beginning would flatten the rest. Intervals are
    seen whole at the end, which is compared."""
    heights, banded = [y for line in lines for y in line.heights], [line for line in lines if line.low is not None]
    ordinary = [loss[int(beginning * len(loss)):] for loss in heights] + [line.high[-1:] for line in banded]
    bottoms = [line.low[int(beginning * len(line.low)):] for line in banded]
    low, high = min(map(np.min, [*heights, *bottoms])), max(map(np.max, ordinary))
    margin *= max(high - low, 1e-6)
    return low - margin, high + margin


def differences(outcomes, than, arm):
    """Of every pair (tokens at evaluations of either, as far as both go; what `arm` has lost there minus what `than`
    has)."""
    for a, b in zip(outcomes[arm], outcomes[than]):
        one, other = a.curve(False), b.curve(False)
        both = [one.spent["tokens"], other.spent["tokens"]]
        x = np.union1d(*both)
        x = x[(x >= max(x[0] for x in both)) & (x <= min(x[-1] for x in both))]
        yield x, np.array([one.at("tokens", tokens) - other.at("tokens", tokens) for tokens in x])


def near_lines(lines):
    """Of many, those that do not end so far off that the others would lie on each other; the rest leave the picture."""
    ends = [abs(line.y[-1]) for line in lines]
    return [line for line, end in zip(lines, ends) if end <= FAR * np.median(ends)]


def draw_differences(ax, outcomes, than):
    """What is compared: seeds lie farther apart than arms do, and within a pair that is taken away."""
    lines = [mean_line([outcomes[than][0].curve(False).spent["tokens"][[0, -1]]], [np.zeros(2)], banded=False)]
    draw_arm(ax, lines[0], outcomes, than)
    for arm in outcomes:
        pairs = list(differences(outcomes, than, arm))
        if arm != than and all(len(x) > 1 for x, _ in pairs):
            lines.append(mean_line(*zip(*pairs), banded(outcomes)))
            draw_arm(ax, lines[-1], outcomes, arm)
    ax.set_ylim(*limits_of(lines if banded(outcomes) else near_lines(lines), 0.05, beginning=0.6))
    ax.set_xlabel(NAMES["tokens"])
    ax.xaxis.set_major_formatter(lambda value, _: short(value))
    ax.set_ylabel(f"within pairs, minus that of '{than}'".replace("$", r"\$"))
    ax.yaxis.set_label_position("right")
    ax.yaxis.tick_right()


def figure_of(study, outcomes):
    """With the legend below the axes: where curves fall from the left and bands are wide, no corner of them is free."""
    seeds, rows = len(next(iter(outcomes.values()))), math.ceil(len(outcomes) / columns(outcomes))
    figure = plt.figure(figsize=(WIDTH, HEIGHT + LEGEND_LINE * (rows + (seeds > 1))), layout="constrained")
    *axes, beside = (figure.add_subplot(1, len(PANELS) + 1, i) for i in range(1, len(PANELS) + 2))
    first = axes[0]
    lines = [draw_arms(ax, outcomes, *panel) for ax, panel in zip(axes, PANELS)]
    for ax in axes[1:]:
        ax.sharey(first)
        ax.tick_params(labelleft=False)
    first.set_ylim(*limits_of(lines[0], 0.05))
    first.set_ylabel("held-out loss, nats per token")
    draw_differences(beside, outcomes, reference(study, outcomes))
    several = "mean and 95 % interval" if seeds >= FEWEST else "thin: each seed; thick: their mean"
    how = several if banded(outcomes) else "means; intervals are in the table"
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=columns(outcomes),
                  handlelength=3.5, title=how if seeds > 1 else None)
    figure.suptitle(f"{study.name}, size {study.size}, {seeds} seed{'s' if seeds > 1 else ''}")
    return figure


def reference(study, outcomes):
    """The arm that others are compared with: the verdict's, unless it could not run."""
    return next((c.than for c in study.compare if c.than in outcomes), next(iter(outcomes)))


def draw_curves(folder, study, outcomes):
    with plt.rc_context(STYLE):
        figure = figure_of(study, outcomes)
        figure.savefig(folder / "curves.png", metadata={"Software": None})
        plt.close(figure)
    return folder / "curves.png"
