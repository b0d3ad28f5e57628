"""The commands of `upmoe` that a study starts, without a model: they leave what the real ones leave, with losses that a
formula gives. A rate of RATE is the best one, one of 1 is too high; each re-drawn neuron of a recipe costs, each seed
moves all arms alike. With a rate of 0 nothing changes, but where the experts have a limit every second step.

Of keys it knows few: a run's `train` has those of TRAIN_KEYS, and experts.reinit is at most 1.

PRETENDED_LOG: a file that gets a line for each command. PRETENDED_KILL: the word of a command that kills whoever
started it, once (the log is how it knows). PRETENDED_REFUSE: num_experts of a recipe that upcycle refuses.
PRETENDED_FAIL: experts.reinit and a seed, "1.0 2", of trainings that fail, but for those of a probe.
"""

import difflib
import json
import math
import os
import random
import signal
import sys
from pathlib import Path

import yaml

RATE = 2e-3
PROBE_STEPS = 5
TRAIN_KEYS = ("steps", "global_batch", "micro_batch", "precision", "eval_every", "eval_sequences", "teacher")


def log(words):
    file = os.environ.get("PRETENDED_LOG")
    if not file:
        return
    before = Path(file).read_text(encoding="utf-8") if Path(file).exists() else ""
    word = os.environ.get("PRETENDED_KILL")
    with open(file, "a", encoding="utf-8") as out:
        print(" ".join(words), file=out)
        if word and word in " ".join(words) and "killed" not in before:
            print("killed", file=out, flush=True)
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()  # until the study's death ends this


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def config_of(model):
    return json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))


def wrong_key(path, run):
    """As the program says it of a run."""
    for key in set(run["train"]) - set(TRAIN_KEYS):
        near = difflib.get_close_matches(key, TRAIN_KEYS, 1)[0]
        print(f"upmoe: error: {path}:7:3: unknown key 'train.{key}'; did you mean train.{near}?", file=sys.stderr)
        return 2
    return 0


def plan(words):
    run = yaml.safe_load(Path(words[0]).read_text(encoding="utf-8"))
    for model in (run["model"]["path"], run["train"].get("teacher", {}).get("model", run["model"]["path"])):
        json.loads(Path(model).read_text(encoding="utf-8"))  # a configuration is enough
    return wrong_key(words[0], run)


def train(words):
    run = yaml.safe_load(Path(words[0]).read_text(encoding="utf-8"))
    folder, steps, lr = Path(run["run"]["dir"]), run["train"]["steps"], run["optimizer"]["lr"]
    if lr >= 1:
        print("upmoe: error: the loss is not finite", file=sys.stderr)
        return 4
    model = config_of(run["model"]["path"])
    taught = "teacher" in run["train"] and bool(config_of(run["train"]["teacher"]["model"]))
    failing = os.environ.get("PRETENDED_FAIL", "").split()
    if steps > PROBE_STEPS and failing == [str(100 * model.get("reinit", 0.0)), str(run["run"]["seed"])]:
        print("upmoe: error: planted: the disk is full", file=sys.stderr)
        return 3
    tokens = run["train"]["global_batch"] * run["data"]["seq_len"]
    shift = 0.1 * random.Random(run["data"]["seed"]).random()  # of the pair
    own = 0.002 * random.Random(f"{run['data']['seed']} {json.dumps(model)}").random()
    start = 4.0 + shift + model.get("reinit", 0.0)

    limited = run.get("router", {}).get("capacity_factor", 0) > 0

    def loss(step):
        if lr == 0:
            return start + 1e-3 * limited * (step % 2)
        return start - 0.5 * (1 - math.exp(-step / 100)) + 0.2 * abs(math.log10(lr / RATE)) * (step > 0) + own

    records, every = [], run["train"]["eval_every"]
    for step in range(steps + 1):
        if step:
            records.append({"step": step, "tokens": step * tokens, "loss": loss(step), "aux_loss": 0.0,
                            "grad_norm": 1.0, "seconds": 0.01, "tokens_per_s": 1e5, "flops": 6e3 * tokens, "ranks": 1,
                            "mfu": None, "dead_experts": 1, "expert_load": [[0.5, 0.5]]})
            if taught:
                records[-1]["flops_teacher"] = 2e3 * tokens
        if step % every == 0 or step == steps:
            records.append({"kind": "eval", "step": step, "tokens": step * tokens, "eval_loss": loss(step),
                            "seconds": 0.002})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    write_json(folder / "starts.jsonl", {"started": "2026-01-01T00:00:00Z", "program": {"version": "pretended"}})
    write_json(folder / "checkpoints/step_1/config.json", model | {"loss": loss(steps)})
    return 0


def upcycle(words):
    recipe = yaml.safe_load(Path(words[0]).read_text(encoding="utf-8"))
    if not 0 <= recipe["experts"].get("reinit", 0.0) <= 1:
        print(f"upmoe: error: {words[0]}: 2 problems\n  {words[0]}:9:3: experts.reinit: expected 0 to 1\n"
              f"  {words[0]}:9:3: experts.reinit: a share", file=sys.stderr)
        return 2
    if "--plan" in words:
        dense = json.loads(Path(words[words.index("--from") + 1]).read_text(encoding="utf-8"))
        print(json.dumps({"config": dense | {"num_experts": recipe["target"]["num_experts"]},
                          "asks_for_tokens": recipe["router"].get("method") == "prompts"
                          or recipe["experts"].get("method") == "cluster"}))
        return 0
    if str(recipe["target"]["num_experts"]) == os.environ.get("PRETENDED_REFUSE"):
        print("upmoe: error: target.num_experts: too many for this machine", file=sys.stderr)
        return 2
    reinit = 0.01 * recipe["experts"].get("reinit", 0.0)
    write_json(Path(words[words.index("--to") + 1]) / "config.json",
               config_of(words[words.index("--from") + 1]) | {"reinit": reinit})
    return 0


def export(words):
    write_json(Path(words[words.index("--to") + 1]) / "config.json", config_of(Path(words[0]) / "checkpoints/step_1"))


def evaluate(words):
    print(json.dumps({"loss": config_of(Path(words[0]) / "checkpoints/step_1")["loss"], "tokens": 1024}))


def cost(words):
    if "--fit" in words:
        print("a law")
        return 0
    print(f"upmoe: error: {' '.join(words)}: nothing that a study asks", file=sys.stderr)
    return 2


def main():
    command, *words = sys.argv[1:]
    log([command, *words])
    return {"plan": plan, "train": train, "upcycle": upcycle, "export": export, "eval": evaluate,
            "cost": cost}[command](words)


if __name__ == "__main__":
    sys.exit(main())
