"""From the arms of a study to commands: a chain of stages for each arm, seed and learning rate.

A stage is named by a hash of everything that its result depends on: its settings and the stages before it. So stages
that arms share are done once, a changed study finds again what it left alone, and nothing that was made in another way
is taken for finished.
"""

import hashlib
import json
from dataclasses import dataclass, replace

from command_line import BadUsage
import study_mates
from study_file import ROOT, read_yaml, steps_of

TUNING_SEED = 0     # its runs choose learning rates; pairs are 1, 2, ...
PROBE_STEPS = 5     # of every training of a probe; the first ones are not timed (study_plan.py)
PLANTED = 0.1       # of the learning rate of the arm beside it
CHECKPOINTS = 4     # of a training: what a kill costs, against writing a mixture's state
LAYOUTS = {"mates": study_mates}  # of the batches of a last training
ORDERS = 10         # data.seed = ORDERS * seed + number of the training in its chain; of the last one ORDERS - 1


@dataclass(frozen=True)
class Stage:
    kind: str        # train or upcycle
    settings: dict      # the YAML file of its command, without the paths
    model: str | None   # train from random weights: a name of the size's models
    shape: dict | None  # of that model
    text: str | None    # train: on which; upcycle: that its recipe looks at, none where it asks for no tokens
    texts: dict         # how the token files are made, where there is a text
    before: str | None  # the stage whose model it begins with
    last: bool = False  # of its chain: is evaluated, and no model is kept
    teacher: str | None = None  # train: the stage whose model it learns from as well

    @property
    def id(self):
        content = {key: getattr(self, key) for key in ("kind", "settings", "model", "shape", "text", "texts", "before",
                                                       "last")}
        content |= {"teacher": self.teacher} if self.teacher else {}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def batches(self):
        """How they are laid out; None: shuffled."""
        return self.texts.get("batches")

    @property
    def steps(self):
        return self.settings["train"]["steps"] if self.kind == "train" else 0

    @property
    def tokens(self):
        return self.steps * self.settings["train"]["global_batch"] * self.settings["data"]["seq_len"]


@dataclass(frozen=True)
class Run:
    """One training of one arm to the end."""
    arm: str
    seed: int
    rate: float
    stages: tuple
    charged: tuple  # ids of the trainings before the last whose cost is the arm's, if its source is charged

    @property
    def last(self):
        return self.stages[-1]

    @property
    def story(self):
        """Settings of all stages, to be told from those of another form of the study."""
        places = {stage.id: i for i, stage in enumerate(self.stages, 1)}
        return {f"{i} {stage.kind}": stage.settings | {"shape": stage.shape, "text": stage.text,
                                                       "teacher": places.get(stage.teacher)}
                for i, stage in enumerate(self.stages, 1)}


def nested(dotted, into=None):
    """{'train.steps': 3} as {'train': {'steps': 3}}, over what `into` has."""
    result = json.loads(json.dumps(into or {}))
    for key, value in dotted.items():
        *sections, name = key.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise BadUsage(f"key '{key}': '{section}' is a value and has no keys")
        place[name] = value
    return result


def recipe_of(study, link, seed):
    figures = study.figures["recipe"]
    base = link.own.get("recipe")
    overrides = link.overrides if base else {key: v for key, v in figures.items() if key != "file"} | link.overrides
    return nested(overrides | {"seed": seed}, read_yaml(ROOT / (base or figures["file"])))


def charged_of(stages):
    """The trainings before the last of which something is in what the last one leaves: what it begins with, and what
    it learns from. Of weights that are drawn anew nothing that was learnt before stays."""
    needed = set()
    for stage in reversed(stages):
        if stage is stages[-1] or stage.id in needed:
            drawn = stage.kind == "train" and stage.settings["model"]["init"] == "random"
            needed |= {stage.teacher} if drawn else {stage.teacher, stage.before}
    return tuple(stage.id for stage in stages[:-1] if stage.kind == "train" and stage.id in needed)


class Builder:
    """The runs of one study."""

    def __init__(self, study):
        self.study = study
        self.texts = {"folders": study.texts, **study.figures["text"]}

    def train(self, link, stages, seed, order, rate=None, share=1.0, probe=False):
        """`stages`: those before it; `rate`: of the last training of a chain; `share`: of its steps."""
        before = stages[-1].id if stages else None
        figures, last = self.study.figures, rate is not None
        steps = max(1, round(steps_of(link.own["steps"], self.study.steps) * share))
        steps = min(steps, PROBE_STEPS) if probe else steps
        compared = not probe and share == 1.0  # of the other runs only the end counts
        every = -(-steps // figures["evaluations"]) if compared else steps
        saved = steps if probe else -(-steps // CHECKPOINTS)  # behind a probe's steps: writing slows the next one
        keys = {**figures["run"], "data.seq_len": figures["seq_len"], "data.seed": ORDERS * seed + order,
                "run.seed": seed, "train.steps": steps, "train.eval_every": every,
                "train.eval_sequences": figures["eval_sequences"], "checkpoint.every": saved,
                "checkpoint.keep": 2,
                "schedule.warmup": round(link.own.get("warmup", figures["warmup"]) * steps),
                "model.init": "random" if before is None else "weights"}
        if last:
            keys |= self.study.last | {"optimizer.lr": rate}
        settings, texts = nested(keys | link.overrides), self.texts
        if batches := link.own.get("batches"):
            settings, texts = nested(LAYOUTS[batches].keys_of(settings), settings), texts | {"batches": batches}
        model = link.own.get("model")
        text = link.own.get("text", self.study.main_text)
        teacher = stages[link.own["teacher"] - 1].id if "teacher" in link.own else None
        return Stage("train", settings, model, figures["models"].get(model), text, texts, before, last, teacher)

    def run(self, arm, seed, rate, share=1.0, probe=False):
        """`share` shortens the last training; `probe`: every training takes PROBE_STEPS."""
        stages, trainings = [], 0
        links = self.study.arms[arm]
        for i, link in enumerate(links):
            last = i == len(links) - 1
            if link.kind == "upcycle":
                seen = link.own.get("calibrate")
                stages.append(Stage("upcycle", recipe_of(self.study, link, seed), None, None, seen,
                                    self.texts if seen else {}, stages[-1].id))
                continue
            order = ORDERS - 1 if last else trainings
            stages.append(self.train(link, stages, seed, order, rate if last else None, share if last else 1.0, probe))
            trainings += 1
        return Run(arm, seed, rate, tuple(stages), charged_of(stages))

    def first(self, arm):
        """Of all but the probes."""
        return (self.tuning(arm) or [self.run(arm, TUNING_SEED + 1, self.study.rates[0])])[0]

    def probes(self):
        return [self.run(arm, TUNING_SEED, self.study.rates[0], probe=True) for arm in self.study.arms]

    def tuning(self, arm):
        """Empty with a single rate."""
        rates = self.study.rates if len(self.study.rates) > 1 else []
        return [self.run(arm, TUNING_SEED, rate, self.study.figures["tune_share"]) for rate in rates]


def planted_name(arm):
    return f"{arm}, a tenth of the rate"


def plant(study, arm):
    """The study with one more arm that must come out worse, and that alone to decide."""
    if arm not in study.arms:
        there = ", ".join(f"'{name}'" for name in study.arms)  # some have a comma
        raise BadUsage(f"--plant '{arm}': no such arm; there are {there}")
    if study.rates == [0.0]:
        raise BadUsage("--plant: nothing is learnt in this study (rates: [0.0]); no rate can be too low for it")
    comparison = replace(study.compare[0], better=arm, than=planted_name(arm), by="loss", at="tokens", worth=0.0)
    return replace(study, arms={arm: study.arms[arm], planted_name(arm): study.arms[arm]}, compare=[comparison],
                   fit=False)


def differences(old, new, place=""):
    """Keys in which two settings differ, as words."""
    words = []
    for key in sorted(set(old) | set(new)):
        a, b, name = old.get(key), new.get(key), f"{place}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            words += differences(a, b, f"{name}.")
        elif a != b:
            words.append(f"{name} {json.dumps(a)} -> {json.dumps(b)}")
    return words
