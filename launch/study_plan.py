"""What a study will take, before it begins: a probe of every arm, a few steps long, says which arms run here at all,
how long a step takes and what it computes, and what a checkpoint and a model weigh.
"""

import json
import shutil
from dataclasses import dataclass
from statistics import median

from command_line import BadInput, display
from study_chain import PROBE_STEPS
from study_work import StageFailed

CHECKPOINTS = 3        # of a run: two that stay and one that is written
UNUSUAL_STEPS = 2      # of a training, its first: they take memory and choose algorithms


@dataclass(frozen=True)
class Measured:
    """Of one stage of a probe."""
    step_s: float  # as usual, of a training
    eval_s: float  # one look at its held-out sequences
    once_s: float  # all else, however many steps follow: start, loading, what the first steps take more, saving
    step_flops: float  # of the model, as it trains there, and of a teacher; all ranks
    checkpoint_bytes: int
    model_bytes: int

    def seconds(self, stage):
        if stage.kind != "train":
            return self.once_s
        evaluations = 1 + -(-stage.steps // stage.settings["train"]["eval_every"])
        return self.once_s + stage.steps * self.step_s + evaluations * self.eval_s

    def flops(self, stage):
        return stage.steps * self.step_flops


def measure(work, stage):
    """Of a finished stage of a probe."""
    record = work.record(stage)
    if stage.kind == "upcycle":
        return Measured(0.0, 0.0, record["wall_s"], 0.0, 0, record["model_bytes"])
    lines = (work.run_dir(stage) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps, looks = [r for r in records if "kind" not in r], [r for r in records if r.get("kind") == "eval"]
    usual = [r for r in steps if r["step"] > UNUSUAL_STEPS] or steps[-1:]
    step_s, eval_s = median(r["seconds"] for r in usual), median(r["seconds"] for r in looks)
    once_s = record["wall_s"] - stage.steps * step_s - len(looks) * eval_s
    step_flops = median((r["flops"] + r.get("flops_teacher", 0)) * r["ranks"] for r in usual)
    return Measured(step_s, eval_s, max(0.0, once_s), step_flops, record["checkpoint_bytes"],
                    record.get("model_bytes", 0))


class Plan:
    """Estimates of stages, from the probe of the arm that has them."""

    def __init__(self, work, builder):
        self.work, self.builder = work, builder
        self.arms = {}  # arm: [Measured], of its stages in order

    def probe(self, say):
        """Every arm for a few steps. Throws BadInput that names all that cannot run."""
        failed, runs = [], self.builder.probes()
        for i, run in enumerate(runs):
            try:
                self.work.ensure(run, lambda stage, i=i, run=run: say(
                    f"probe {i + 1}/{len(runs)}: arm '{run.arm}': {stage.kind}"))
                self.weigh(run)
            except StageFailed as problem:
                failed.append(f"arm '{run.arm}' cannot run: {problem}")
        for i, run in enumerate(runs):
            self.work.drop_models(run, runs[i + 1:])
        if failed:
            raise BadInput("; ".join(failed) + "; nothing was begun")

    def weigh(self, run):
        self.arms[run.arm] = [measure(self.work, stage) for stage in run.stages]

    def of(self, run, stage):
        return self.arms[run.arm][run.stages.index(stage)]

    def seconds(self, run, stage):
        return self.of(run, stage).seconds(stage)

    def left(self, runs):
        """{stage id: (seconds, FLOPs)} of what is not finished, each stage once."""
        return {stage.id: (self.seconds(run, stage), self.of(run, stage).flops(stage))
                for run in runs if not self.work.finished(run.last)
                for stage in run.stages if not self.work.finished(stage)}

    def disk(self, runs):
        """Bytes that are still to come: the largest run while it goes on, and the dense models that stay for other
        arms."""
        runs = [run for run in runs if not self.work.finished(run.last)]
        kept = {stage.id: self.of(run, stage).model_bytes for run in runs for stage in run.stages
                if stage.kind == "train" and not stage.last and not self.work.finished(stage)}
        return sum(kept.values()) + max(
            (CHECKPOINTS * max(self.of(run, stage).checkpoint_bytes for stage in run.stages) +
             sum(self.of(run, stage).model_bytes for stage in run.stages if stage.kind == "upcycle") for run in runs),
            default=0)

    def require_disk(self, runs):
        need, free = self.disk(runs), shutil.disk_usage(self.work.folder).free
        if need > free:
            raise BadInput(f"{display(self.work.folder)}: the study needs {size_in_words(need)} of disk at a time, "
                           f"{size_in_words(free)} are free; give --out on another disk")
        return need

    def lines(self, tuning, paired):
        """The plan for people: a line for each arm, and the sum."""
        done = sum(self.work.finished(run.last) for run in [*tuning, *paired])
        yield f"{'arm':32} {'runs':>5} {'steps':>7} {'FLOP per run':>13} {'minutes per run':>16}"
        for arm in self.builder.study.arms:
            runs = [run for run in paired if run.arm == arm]
            last, whole = runs[0].last, self.of(runs[0], runs[0].last)
            count = len(runs) + sum(run.arm == arm for run in tuning)
            yield (f"{arm:32} {count:5} {last.steps:7} {whole.flops(last):13.3g} "
                   f"{self.seconds(runs[0], last) / 60:16.1f}")
        left = self.left([*tuning, *paired])
        yield (f"{len(tuning)} runs for the learning rates and {len(paired)} of pairs, {done} of them finished; "
               f"left are {sum(f for _, f in left.values()):.3g} FLOP, sources included, about "
               f"{minutes(sum(s for s, _ in left.values()))} here, and {size_in_words(self.disk([*tuning, *paired]))} "
               "of disk at a time")
        yield f"measured by {PROBE_STEPS} steps of each arm"
        trainings = [stage for run in paired for stage in run.stages if stage.kind == "train"]
        passes = self.work.passes(max(trainings, key=lambda stage: stage.tokens))
        if passes > 1:
            yield f"the longest training goes over its text {passes:.1f} times; --text gives a larger one"


def minutes(seconds):
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def size_in_words(size):
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


class Clock:
    """Time left: the plan's, corrected by how long what was done since really took."""

    def __init__(self, plan, runs, now):
        self.plan, self.now = plan, now
        self.began = now()
        self.foretold = self.ahead(runs)
        self.earlier = {}  # stage id: the share of it that was done before, of a training that goes on

    def ahead(self, runs):
        """{stage id: seconds} of what is not finished."""
        return {stage: seconds for stage, (seconds, _) in self.plan.left(runs).items()}

    def behind(self, ahead):
        """Foretold seconds of what was finished since. What failed, or is left out because it would, is neither
        behind nor ahead."""
        return sum(seconds * (1 - self.earlier.get(stage, 0.0)) for stage, seconds in self.foretold.items()
                   if stage not in ahead and self.plan.work.record(stage) is not None)

    def left(self, runs, current=None, share=0.0):
        """Seconds, when of the stage `current` = (run, stage) so much is done; asked when it begins, too."""
        stages = self.ahead(runs)
        ahead, behind = sum(stages.values()), self.behind(stages)
        if current:
            seconds = self.plan.seconds(*current)
            ahead -= share * seconds
            behind += max(0.0, share - self.earlier.setdefault(current[1].id, share)) * seconds
        spent, enough = self.now() - self.began, 0.05 * sum(self.foretold.values())
        return max(0.0, ahead) * (spent / behind if behind > enough else 1.0)
