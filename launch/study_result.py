"""What a study found: table.md and result.json, the same bits whenever it is done again; timings.md, which has the
seconds.
"""

import json
import math

import numpy as np
from run_metrics import read_run
from study_mates import changes_of
from study_measures import MEASURES, NAMES, REPRODUCED, by_measure, nats
from study_statistics import METHOD, Curve, interval
from whole_file import write_whole


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

    def changes(self):
        return changes_of(self.steps)

    def dead(self):
        return self.steps[-1].get("dead_experts")


def table(rows):
    head, *body = [[str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body]) + "\n"


def arm_rows(study, outcomes, rates):
    yield ["arm", "learning rate", "loss before the first step", "held-out loss at the end", "dead experts",
           "variation of the load", "tokens", "FLOPs", "FLOPs with the source"]
    for arm, runs in outcomes.items():
        loss, first = interval([o.loss for o in runs]), np.mean([o.sunk.loss[0] for o in runs])
        dead, uneven = [o.dead() for o in runs], [o.load_variation() for o in runs]
        edge = len(study.rates) > 1 and rates[arm] in (study.rates[0], study.rates[-1])
        yield [arm, f"{rates[arm]:g}{' (edge of the grid)' if edge else ''}", f"{first:.4f}",
               nats(loss, ""), "-" if None in dead else f"{np.mean(dead):.1f}",
               "-" if None in uneven else f"{np.mean(uneven):.2f}", f"{runs[0].sunk.end('tokens'):,.0f}",
               f"{runs[0].sunk.end('flops'):.3g}", f"{runs[0].charged.end('flops'):.3g}"]


def missing(comparison, outcomes):
    """Arms that it is about and that did not come to an end."""
    return [arm for arm in (comparison.better, comparison.than) if arm not in outcomes]


def verdict_lines(study, outcomes):
    for comparison in study.compare:
        measure = MEASURES[comparison.by]
        if gone := missing(comparison, outcomes):
            word = "not compared: " + " and ".join(f"'{arm}'" for arm in gone) + " failed"
        else:
            word = measure.judge(comparison, outcomes)[1] or measure.unreached
        yield f"* {measure.claim(comparison)}: **{word}**"


def write_tables(folder, study, outcomes, rates, fits):
    """Yields the files that it wrote."""
    seeds, comparisons = len(next(iter(outcomes.values()))), [c for c in study.compare if not missing(c, outcomes)]
    text = [f"# {study.name}, size {study.size}, {seeds} paired seed{'s' if seeds > 1 else ''}", "", study.claim, "",
            *verdict_lines(study, outcomes), "",
            f"Held-out loss in nats per token. In brackets: the 95 % interval of the mean over seeds, {METHOD}.", "",
            table(arm_rows(study, outcomes, rates)),
            *(part for measure, compared in by_measure(comparisons)
              for part in (table(measure.rows(compared, outcomes)), measure.note))]
    if fits:
        text += ["", "What `upmoe cost --fit` finds in the arms with a source, seed by seed:", "",
                 *(f"    {line}" for fit in fits for line in fit.rstrip().splitlines())]
    write_whole(folder / "table.md", "\n".join(text) + "\n")
    yield folder / "table.md"
    times = [table(rows) for measure, compared in by_measure(comparisons)
             if (rows := list(measure.timings(compared, outcomes)))]
    if times:
        write_whole(folder / "timings.md", f"# {study.name}, size {study.size}: seconds of training steps, as they "
                    "were\n\n" + "\n".join(times))
        yield folder / "timings.md"


def finite(value):
    return value if isinstance(value, (str, int)) or value is None or math.isfinite(value) else None


def write_result(folder, study, outcomes, rates):
    def comparison_json(comparison):
        measure = MEASURES[comparison.by]
        asked = {key: finite(getattr(comparison, key)) for key in comparison.__dataclass_fields__} | {
            "claim": measure.claim(comparison)}
        if missing(comparison, outcomes):
            return asked | {"verdict": "not compared", "seeds_to_decide": None, "mean": None, "low": None, "high": None,
                            "pairs": 0}
        found, word = measure.judge(comparison, outcomes)
        return asked | {
            "verdict": word.word if word else "not reached",
            "seeds_to_decide": word.seeds if word else None, "mean": finite(found.mean), "low": finite(found.low),
            "high": finite(found.high), "pairs": found.pairs}

    measures = {comparison.by: MEASURES[comparison.by] for comparison in study.compare}
    result = {"study": study.name, "size": study.size, "claim": study.claim,
              "verdict": comparison_json(study.compare[0])["verdict"],
              "comparisons": [comparison_json(comparison) for comparison in study.compare],
              "arms": {arm: {"rate": rates[arm], "seeds": [
                  {"seed": o.run.seed, "stages": [stage.id for stage in o.run.stages], "heldout_loss": o.loss,
                   "tokens": o.sunk.end("tokens"), "flops": o.sunk.end("flops"),
                   "flops_with_source": o.charged.end("flops"), "dead_experts": o.dead(),
                   "curve": {"loss": o.sunk.loss.tolist(),
                             **{axis: o.sunk.spent[axis].tolist() for axis in REPRODUCED}}} |
                  {key: finite(value) for measure in measures.values() for key, value in measure.facts(o).items()}
                  for o in runs]} for arm, runs in outcomes.items()}}
    write_whole(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return folder / "result.json"
