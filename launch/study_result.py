"""What a study found: table.md and result.json, the same bits whenever it is done again; timings.md, which has the
seconds; curves.png.
"""

import json
import math

import matplotlib
import numpy as np
from run_metrics import read_run
from study_statistics import Curve, cost_ratio, interval, loss_difference, verdict
from whole_file import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from run_curves import STYLE, draw_line, mean_line, palette  # noqa: E402

NAMES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training"}
REPRODUCED = ("tokens", "flops")  # the same whenever a study is done again


class Outcome:
    """One run: its curve with and without what its dense source had cost."""

    def __init__(self, work, run):
        metrics = read_run(work.run_dir(run.last), run.arm, "#000000")
        spent = {axis: metrics.x(metrics.evals, axis) for axis in NAMES}
        losses = np.array([record["eval_loss"] for record in metrics.evals], dtype=float)
        self.sunk = Curve(losses, spent)
        before = {axis: 0.0 for axis in NAMES}
        for stage in run.charged:
            source = read_run(work.run_dir(stage), run.arm, "#000000")
            for axis in NAMES:
                before[axis] += float(source.x(source.steps, axis)[-1])
        self.charged = self.sunk.later(before)
        self.loss = work.evaluated(run.last)["loss"]
        self.steps = metrics.steps
        self.run = run

    def curve(self, with_source):
        return self.charged if with_source else self.sunk

    def load_variation(self):
        """Deviation of the experts' loads over their mean, at the last step that has them, mean over layers."""
        loads = [np.array(record["expert_load"]) for record in self.steps if record.get("expert_load")]
        return float(np.mean(loads[-1].std(axis=1) / loads[-1].mean(axis=1))) if loads else None

    def dead(self):
        return self.steps[-1].get("dead_experts")


def compared(comparison, outcomes, axis, by, with_source):
    """Interval over the pairs of seeds."""
    function = loss_difference if by == "loss" else cost_ratio
    return interval([function(a.curve(with_source), b.curve(with_source), axis) for a, b in
                     zip(outcomes[comparison.better], outcomes[comparison.than], strict=True)])


def verdict_of(comparison, outcomes):
    found = compared(comparison, outcomes, comparison.at, comparison.by, comparison.with_source)
    if not math.isfinite(found.mean):
        return found, None
    if comparison.by == "loss":
        return found, verdict(found, 0.0, comparison.worth)
    return found, verdict(found, math.log(comparison.most))


def words_of(found, by):
    if not math.isfinite(found.mean):
        return "not reached"
    scale = math.exp if by == "cost" else float
    text = f"{scale(found.mean):{'+.4f' if by == 'loss' else '.3f'}}"
    if found.pairs < 2:
        return f"{text} (one pair)"
    low, high = scale(found.low), scale(found.high)
    return f"{text} [{low:+.4f}, {high:+.4f}]" if by == "loss" else f"{text} [{low:.3f}, {high:.3f}]"


def sentence(comparison):
    source = ", their sources charged" if comparison.with_source else ""
    if comparison.by == "loss":
        least = f" by {comparison.worth:g} nats" if comparison.worth else ""
        return f"'{comparison.better}' ends below '{comparison.than}'{least} at equal {NAMES[comparison.at]}{source}"
    return (f"'{comparison.better}' comes to the loss of '{comparison.than}' for {comparison.most:g} of its "
            f"{NAMES[comparison.at]}{source}")


def table(rows):
    head, *body = [[str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body]) + "\n"


def arm_rows(study, outcomes, rates):
    yield ["arm", "learning rate", "loss before the first step", "held-out loss at the end", "dead experts",
           "variation of the load", "tokens", "FLOPs", "FLOPs with the source"]
    for arm in study.arms:
        runs = outcomes[arm]
        loss, first = interval([o.loss for o in runs]), np.mean([o.sunk.loss[0] for o in runs])
        dead, uneven = [o.dead() for o in runs], [o.load_variation() for o in runs]
        edge = len(study.rates) > 1 and rates[arm] in (study.rates[0], study.rates[-1])
        yield [arm, f"{rates[arm]:g}{' (edge of the grid)' if edge else ''}", f"{first:.4f}",
               words_of(loss, "loss").replace("+", ""), "-" if None in dead else f"{np.mean(dead):.1f}",
               "-" if None in uneven else f"{np.mean(uneven):.2f}", f"{runs[0].sunk.end('tokens'):,.0f}",
               f"{runs[0].sunk.end('flops'):.3g}", f"{runs[0].charged.end('flops'):.3g}"]


def comparison_rows(study, outcomes, axes):
    yield ["first arm, second arm", "at equal", "loss, first - second, nats", "sources charged",
           "cost to an equal loss, first / second", "sources charged"]
    pairs = {(comparison.better, comparison.than): comparison for comparison in study.compare}
    for comparison in pairs.values():
        for axis in axes:
            cells = [words_of(compared(comparison, outcomes, axis, by, charged), by)
                     for by in ("loss", "cost") for charged in (False, True)]
            yield [f"{comparison.better}, {comparison.than}", NAMES[axis], *cells]


def verdict_lines(study, outcomes):
    for comparison in study.compare:
        _, found = verdict_of(comparison, outcomes)
        yield f"* {sentence(comparison)}: **{found or 'not reached: the two never come to one loss'}**"


def write_tables(folder, study, outcomes, rates, fits):
    seeds = len(next(iter(outcomes.values())))
    text = [f"# {study.name}, size {study.size}, {seeds} paired seed{'s' if seeds > 1 else ''}", "", study.claim, "",
            *verdict_lines(study, outcomes), "",
            "Held-out loss in nats per token. In brackets: the 95 % interval of the mean over seeds (Student's t), of "
            "differences and ratios within pairs.", "", table(arm_rows(study, outcomes, rates)),
            table(comparison_rows(study, outcomes, REPRODUCED)),
            "Where two arms spent unequally, the dearer one is read before its end, at a learning rate that was still "
            "high; of ratios the mean is geometric."]
    if fits:
        text += ["", "What `upmoe cost --fit` finds in the arms with a source, seed by seed:", "",
                 *(f"    {line}" for fit in fits for line in fit.rstrip().splitlines())]
    write_whole(folder / "table.md", "\n".join(text) + "\n")
    times = table(comparison_rows(study, outcomes, ("seconds",)))
    write_whole(folder / "timings.md", f"# {study.name}, size {study.size}: seconds of training steps, as they were\n\n"
                f"{times}")


def finite(value):
    return value if isinstance(value, (str, int)) or value is None or math.isfinite(value) else None


def write_result(folder, study, outcomes, rates):
    def comparison_json(comparison):
        found, word = verdict_of(comparison, outcomes)
        return {key: finite(getattr(comparison, key)) for key in comparison.__dataclass_fields__} | {
            "claim": sentence(comparison), "verdict": word.word if word else "not reached",
            "seeds_to_decide": word.seeds if word else None, "mean": finite(found.mean), "low": finite(found.low),
            "high": finite(found.high), "pairs": found.pairs}

    result = {"study": study.name, "size": study.size, "claim": study.claim,
              "verdict": comparison_json(study.compare[0])["verdict"],
              "comparisons": [comparison_json(comparison) for comparison in study.compare],
              "arms": {arm: {"rate": rates[arm], "seeds": [
                  {"seed": o.run.seed, "stages": [stage.id for stage in o.run.stages], "heldout_loss": o.loss,
                   "tokens": o.sunk.end("tokens"), "flops": o.sunk.end("flops"),
                   "flops_with_source": o.charged.end("flops"), "dead_experts": o.dead(),
                   "curve": {"loss": o.sunk.loss.tolist(),
                             **{axis: o.sunk.spent[axis].tolist() for axis in REPRODUCED}}}
                  for o in outcomes[arm]]} for arm in study.arms}}
    write_whole(folder / "result.json", json.dumps(result, indent=1) + "\n")


def draw_curves(folder, study, outcomes):
    panels = [("tokens", False), ("flops", False), ("flops", True)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(15, 4.8), layout="constrained", sharey=True)
        for ax, (axis, charged) in zip(axes, panels):
            for arm, colour in zip(study.arms, palette(len(study.arms))):
                curves = [o.curve(charged) for o in outcomes[arm]]
                line = mean_line([c.spent[axis] for c in curves], [c.loss for c in curves])
                draw_line(ax, line, colour, arm.replace("$", r"\$"))
            ax.set_xlabel(NAMES[axis] + (", sources charged" if charged else ""))
        ends = [o.sunk.loss for runs in outcomes.values() for o in runs]
        ordinary = [loss[len(loss) // 5:] for loss in ends]  # the first fall would flatten the rest
        axes[0].set_ylim(min(map(np.min, ends)) - 0.05, max(map(np.max, ordinary)) + 0.05)
        axes[0].set_ylabel("held-out loss, nats per token")
        axes[0].legend()
        seeds = len(next(iter(outcomes.values())))
        figure.suptitle(f"{study.name}, size {study.size}: mean and 95 % interval of {seeds} seeds")
        figure.savefig(folder / "curves.png", metadata={"Software": None})
        plt.close(figure)
