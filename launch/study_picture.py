"""The curves of a study as a picture, curves.png; apart from the rest because matplotlib takes a second to load."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from run_curves import FEWEST, STYLE, draw_line, mean_line, palette  # noqa: E402
from study_measures import NAMES  # noqa: E402


def draw_curves(folder, study, outcomes):
    panels = [("tokens", False), ("flops", False), ("flops", True)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(15, 4.8), layout="constrained", sharey=True)
        for ax, (axis, charged) in zip(axes, panels):
            for arm, colour in zip(outcomes, palette(len(outcomes))):
                curves = [o.curve(charged) for o in outcomes[arm]]
                line = mean_line([c.spent[axis] for c in curves], [c.loss for c in curves])
                draw_line(ax, line, colour, arm.replace("$", r"\$"))
            ax.set_xlabel(NAMES[axis] + (", sources charged" if charged else ""))
        ends = [o.sunk.loss for runs in outcomes.values() for o in runs]
        ordinary = [loss[len(loss) // 5:] for loss in ends]  # the first fall would flatten the rest
        axes[0].set_ylim(min(map(np.min, ends)) - 0.05, max(map(np.max, ordinary)) + 0.05)
        axes[0].set_ylabel("held-out loss, nats per token")
        seeds = len(next(iter(outcomes.values())))
        how = "mean and 95 % interval" if seeds >= FEWEST else "thin: each seed; thick: their mean"
        axes[0].legend(title=how if seeds > 1 else None)
        figure.suptitle(f"{study.name}, size {study.size}, {seeds} seed{'s' if seeds > 1 else ''}")
        figure.savefig(folder / "curves.png", metadata={"Software": None})
        plt.close(figure)
    return folder / "curves.png"
