"""provenance.json: by what the numbers of a study were made, when, where, and what that took. Apart from result.json,
which has the same bits whenever a study is done again.
"""

import datetime
import hashlib
import json
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version

from command_line import display
from run_metrics import read_run
from study_file import ROOT
from study_statistics import METHOD
from whole_file import write_whole

PACKAGES = ("numpy", "scipy", "matplotlib", "h5py", "tokenizers", "PyYAML")


def version_of(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def starts_of(work, stage):
    """What `upmoe train` noted of each of its starts."""
    try:
        lines = (work.run_dir(stage) / "starts.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []


def flops_of(work, stage):
    return float(read_run(work.run_dir(stage), stage.id, "#000000").x([{"step": stage.steps}], "flops")[-1])


def stage_facts(work, stage):
    record, starts = work.record(stage), starts_of(work, stage)
    if record.get("diverged"):
        return {"id": stage.id, "kind": stage.kind, "diverged": True}
    facts = {"id": stage.id, "kind": stage.kind, "wall_s": record["wall_s"]}
    if stage.kind == "train":
        facts |= {"steps": stage.steps, "tokens": stage.tokens, "flops": flops_of(work, stage),
                  "started": [start.get("started") for start in starts]}
    return facts


def place_of(file):
    """A file of the project as it is called there, wherever that lies."""
    whole = file.resolve()
    return str(whole.relative_to(ROOT)) if whole.is_relative_to(ROOT) else display(whole)


def different(values):
    """Each value once, in their order."""
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value, sort_keys=True) for value in values)]


def write_provenance(work, study, runs):
    """`runs`: finished ones, those that chose learning rates too."""
    runs = [run for run in runs if work.finished(run.last)]
    stages = {stage.id: stage for run in runs for stage in run.stages}
    facts = {name: stage_facts(work, stage) for name, stage in stages.items() if work.record(stage)}
    starts = [start for stage in stages.values() for start in starts_of(work, stage)]
    words = sys.argv[1:]
    if "--upmoe" in words:  # which the program says of itself
        del words[words.index("--upmoe"):words.index("--upmoe") + 2]
    found = {
        "study": study.name, "size": study.size, "file": place_of(study.file),
        "file_sha256": hashlib.sha256(study.file.read_bytes()).hexdigest(), "texts": study.texts, "intervals": METHOD,
        "command": shlex.join(["upmoe", "study", *words]),
        "concluded": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "programs": different(start.get("program") for start in starts),
        "machines": different({key: start.get(key) for key in ("machine", "hosts", "cores", "ranks")}
                              for start in starts),
        "host": {"system": platform.platform(), "processor": platform.machine()},
        "python": platform.python_version(), "packages": {name: version_of(name) for name in PACKAGES},
        "flops": sum(fact.get("flops", 0.0) for fact in facts.values()),
        "wall_s": sum(fact.get("wall_s", 0.0) for fact in facts.values()),
        "runs": [{"arm": run.arm, "seed": run.seed, "rate": run.rate, "stages": [stage.id for stage in run.stages]}
                 for run in runs],
        "stages": list(facts.values())}
    path = work.folder / "provenance.json"
    write_whole(path, json.dumps(found, indent=1) + "\n")
    return path
