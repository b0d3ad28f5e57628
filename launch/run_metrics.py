"""What runs of training left in RUN_DIR/metrics.jsonl, checked record by record, against any axis."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from command_line import BadInput, display

AXES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training", "step": "step"}


@dataclass
class Run:
    path: Path
    label: str
    colour: str
    steps: list = field(default_factory=list)  # training records
    evals: list = field(default_factory=list)  # held-out records
    starts: dict = field(default_factory=dict)  # where this run starts on a horizontal axis; 0 where it is not given

    def x(self, records, against):
        if against in ("tokens", "step"):
            return np.array([r[against] for r in records], dtype=float) + self.starts.get(against, 0.0)
        ends = np.array([r["step"] for r in self.steps], dtype=float)
        spent = np.cumsum([cost_of(self, r, against) * gap for r, gap in zip(self.steps, np.diff(ends, prepend=0.0))])
        reached = np.interp([r["step"] for r in records], np.insert(ends, 0, 0.0), np.insert(spent, 0, 0.0))
        return reached + self.starts.get(against, 0.0)

    @property
    def title(self):
        return title_of(self.label)

    def sets(self):
        """Names of the held-out sets, in the order that they came in."""
        return list(dict.fromkeys(name for record in self.evals for name in record.get("valid_loss", {})))

    def of_set(self, name):
        """The evaluations that had this set, with its loss for theirs."""
        return [record | {"eval_loss": record["valid_loss"][name]} for record in self.evals
                if name in record.get("valid_loss", {})]

    def loads(self):
        return [(r["step"], np.array(r["expert_load"], dtype=float)) for r in self.steps if r.get("expert_load")]

    def load_at_end(self):
        """Mixtures by experts, mean over the last tenth of the run; 1 is a fair share."""
        loads = [load for _, load in self.loads()]
        if not loads:
            raise BadInput(f"{display(self.path)}: its metrics carry no expert_load, which training a mixture logs")
        recent = np.mean(loads[-max(1, len(loads) // 10):], axis=0)
        return recent * recent.shape[1]


def axes_of(runs):
    """The axes that all the runs can be drawn against."""
    counted = all("flops" in record and "ranks" in record for run in runs for record in run.steps)
    return [axis for axis in AXES if axis != "flops" or counted]


def cost_of(run, record, against):
    """Seconds or FLOPs of one step. Records may be several steps apart; each stands for those since the last."""
    if against == "seconds":
        return record["seconds"]
    if "flops" not in record or "ranks" not in record:
        raise BadInput(f"{display(run.path)}: its metrics carry no flops or no ranks; use --against tokens, seconds or "
                       "step")
    return (record["flops"] + record.get("flops_teacher", 0)) * record["ranks"]


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
    for key in ("flops", "flops_teacher", "ranks"):
        number(record, key)
    for key in ("loss", "eval_loss", "grad_norm", "mfu"):
        number(record, key, gap=True)
    sets = record.get("valid_loss", {})
    if not isinstance(sets, dict):
        raise ValueError("valid_loss is not an object of losses by name")
    for name in sets:
        number(sets, name, gap=True)
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
            raise BadInput(f"{display(file)}:{place}: not a metrics record ({words}); remove the line to go on without "
                           "it") from None
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


def rolling_quantiles(y, quantiles, points=200):
    """At up to so many places: their indices, and the quantiles of the values around each; gaps stay out of it.

    A step that something else on the machine held up moves a mean, and hardly a median.
    """
    places = np.unique(np.linspace(0, len(y) - 1, min(points, len(y))).round().astype(int))
    half = max(2, len(y) // 40)
    found = np.full((len(quantiles), len(places)), math.nan)
    for i, place in enumerate(places):
        near = y[max(0, place - half):place + half + 1]
        near = near[np.isfinite(near)]
        if near.size:
            found[:, i] = np.quantile(near, quantiles)
    return places, found
