"""The stages of a study as commands in a folder: what is done is not done again, what was killed goes on.

FOLDER/stages/ID holds a stage: the YAML file of its command, its log, a training run, the model or the evaluation that
came of it, and at last done.json. Checkpoints go when their run is evaluated or exported; a mixture goes when no run
that is left begins with it, and is made again when one does.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from command_line import BadInput, display
from study_chain import LAYOUTS
from study_file import ROOT, STANDARD_TEXT, folder_of
from whole_file import write_whole

sys.path.append(str(ROOT / "data"))
from hdf5_child import die_with  # noqa: E402

STOPPED = 75     # of a training that was asked to stop
NOT_FINITE = 4   # of one whose loss was no number any more
HEADS = 64    # hidden units of one head
LINES = 3     # of a failed command that are told


class StageFailed(BadInput):
    """A command ended with another status than 0; its words."""

    def __init__(self, words, status, said=()):
        super().__init__(words)
        self.status, self.said = status, said


class Stopped(Exception):
    """A request to stop reached the study."""


def bytes_in(folder):
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def config_of(shape, vocab, eos, positions):
    """config.json of a dense model; `shape` has sizes, and any other key that differs from these."""
    heads = max(1, shape["hidden_size"] // HEADS)
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "vocab_size": vocab,
            "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": positions,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "initializer_range": 0.02,
            "attention_dropout": 0.0, "bos_token_id": eos, "eos_token_id": eos,
            "torch_dtype": "float32"} | shape


def positions_of(figures):
    return max(2048, figures["seq_len"])


class Work:
    """`program`: the words that start upmoe. Where a function takes `progress`, that is called with the steps that a
    training has made, about once a second."""

    def __init__(self, folder, program, study):
        self.folder, self.program, self.study = folder, program, study
        self.child, self.stop = None, False

    # ---- the folder ----

    @contextlib.contextmanager
    def alone(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "upmoe.lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f"{display(self.folder)}: another study works there; wait for it, or give --out"
                               ) from None
            yield

    def place(self, stage):
        return self.folder / "stages" / (stage if isinstance(stage, str) else stage.id)

    def record(self, stage):
        """What done.json says; none of a stage that is not finished."""
        try:
            return json.loads((self.place(stage) / "done.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def finished(self, stage):
        """Whether its result is there: of a stage that is not the last, the model."""
        return self.record(stage) is not None and (stage.last or (self.place(stage) / "model/config.json").is_file())

    def run_dir(self, stage):
        return self.place(stage) / "run"

    def loss(self, stage):
        """Held-out, at the end; infinite where the training diverged."""
        return math.inf if self.record(stage).get("diverged") else self.evaluated(stage)["loss"]

    def evaluated(self, stage):
        return json.loads((self.place(stage) / "eval.json").read_text(encoding="utf-8"))

    # ---- commands ----

    def request_stop(self, *_):
        self.stop = True
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                self.child.send_signal(signal.SIGTERM)

    def call(self, words, log, progress=None):
        """Standard output of a command; what it says else goes into `log`."""
        if self.stop:
            raise Stopped
        parent = os.getpid()
        with open(log, "ab") as said:
            began = said.tell()
            self.child = subprocess.Popen([str(word) for word in words], stdin=subprocess.DEVNULL,
                                          stdout=subprocess.PIPE, stderr=said,
                                          start_new_session=True, preexec_fn=lambda: die_with(parent))
            while True:
                try:
                    printed, _ = self.child.communicate(timeout=1.0)
                    break
                except subprocess.TimeoutExpired:
                    if progress:
                        progress()
            status, self.child = self.child.returncode, None
        if self.stop:
            raise Stopped
        if status != 0:
            with open(log, "rb") as said:
                said.seek(began)
                lines = said.read().decode("utf-8", "replace").strip().splitlines()
            told = [line for line in lines if "error:" in line] or lines
            raise StageFailed(f"{self.shown(words)}: status {status}: {' '.join(told[-LINES:]) or 'no words'}", status,
                              lines)
        return printed.decode("utf-8", "replace")

    def shown(self, words):
        return " ".join("upmoe" if i < len(self.program) and len(self.program) == 1 else str(w)
                        for i, w in enumerate(words[:len(self.program) + 2]))

    # ---- tokens and shapes ----

    def tokens(self, text, held_out=False):
        return self.folder / "tokens" / f"{text}_{'valid' if held_out else 'train'}.h5"

    def make_tokens(self, say):
        """The first text trains the tokenizer of all."""
        key = json.dumps({"folders": self.study.texts} | self.study.figures["text"], sort_keys=True)
        made = self.folder / "tokens" / "made.json"
        if made.is_file() and made.read_text(encoding="utf-8") == key:
            return
        if made.is_file():
            raise BadInput(f"{display(self.folder)}: its tokens were made of other texts ({made.read_text()}), over "
                           "which no arm can be compared; give another --out, or move the folder away")
        made.parent.mkdir(parents=True, exist_ok=True)
        figures, log = self.study.figures["text"], self.folder / "tokens" / "log.txt"
        for i, (name, source) in enumerate(self.study.texts.items()):
            say(f"text {name}: collecting {figures['megabytes']} MB and making tokens")
            lists = self.folder / "text" / name
            chosen = [] if source == STANDARD_TEXT else ["--text", ROOT / source]
            self.call([sys.executable, ROOT / "launch/collect_text.py", *chosen, "--megabytes", figures["megabytes"],
                       "--out", lists], log)
            for held_out in (False, True):
                new = ["--train-vocab", figures["vocab"], "--force"] if i == 0 and not held_out else []
                files = (lists / ("valid.txt" if held_out else "train.txt")).read_bytes().split(b"\n")
                self.call([sys.executable, ROOT / "data/tokenize.py", *new, "--tokenizer",
                           self.folder / "tokens/tokenizer.json", "--out", self.tokens(name, held_out),
                           *(os.fsdecode(path) for path in files if path)], log)
        write_whole(made, key)

    def laid_out(self, stage):
        """The token file of a training whose batches are not shuffled."""
        path = self.tokens(stage.text)
        return path.with_name(f"{path.stem}_{stage.batches}_{LAYOUTS[stage.batches].size_of(stage.settings)}.h5")

    def training_tokens(self, stage):
        """An entry of data.train."""
        if stage.batches is None:
            return {"path": str(self.tokens(stage.text)), "weight": 1.0}
        return {"path": str(self.laid_out(stage)), "weight": 1.0, "loss_mask": True}

    def passes(self, stage):
        """How often a training goes over its text."""
        import h5py  # here alone: what plans and compares needs no token file
        with h5py.File(self.tokens(stage.text), "r") as file:
            return stage.tokens / len(file["tokens"])

    def random_model(self, stage):
        """A folder with the shape of what a first stage trains."""
        folder = self.folder / "shapes" / f"{stage.model}-{stage.id}"
        if not (folder / "config.json").is_file():
            import h5py  # as above
            with h5py.File(self.tokens(stage.text), "r") as file:
                vocab, eos = int(file.attrs["vocab_size"]), int(file.attrs["eos_id"])
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / "tokens/tokenizer.json", folder)
            config = config_of(stage.shape, vocab, eos, positions_of(self.study.figures))
            write_whole(folder / "config.json", json.dumps(config, indent=1))
        return folder

    def input_of(self, stage):
        return self.random_model(stage) if stage.before is None else self.place(stage.before) / "model"

    def teacher_of(self, stage):
        return self.place(stage.teacher) / "model" if stage.teacher else None

    # ---- stages ----

    def perform(self, run, stage, progress=None):
        """One stage of a run, or what is left of it."""
        folder, before = self.place(stage), self.record(stage)
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        facts = (self.upcycle if stage.kind == "upcycle" else self.train)(stage, folder, progress)
        if before is None:
            facts["wall_s"] = time.monotonic() - began
            if stage.last:
                facts |= {"arm": run.arm, "seed": run.seed, "rate": run.rate, "story": run.story}
                write_whole(self.run_dir(stage) / "study.json", json.dumps({"arm": run.arm, "seed": run.seed}))
            write_whole(folder / "done.json", json.dumps(facts, indent=1))

    def upcycle(self, stage, folder, _):
        write_whole(folder / "recipe.yaml", yaml.safe_dump(stage.settings, sort_keys=False))
        seen = ["--calibrate", self.tokens(stage.text)] if stage.text else []
        if not (folder / "model/config.json").is_file():
            self.call([*self.program, "upcycle", folder / "recipe.yaml", "--from", self.input_of(stage), "--to",
                       folder / "model", *seen], folder / "log.txt")
        return {"model_bytes": bytes_in(folder / "model")}

    def run_settings(self, stage, model, teacher):
        """What `upmoe train` is given, with its paths; `teacher`: of a stage that has one."""
        settings = json.loads(json.dumps(stage.settings))
        settings.setdefault("run", {})["dir"] = str(self.run_dir(stage))
        settings.setdefault("model", {})["path"] = str(model)
        if stage.teacher:
            settings["train"].setdefault("teacher", {})["model"] = str(teacher)
        settings["data"] |= {"train": [self.training_tokens(stage)],
                             "valid": str(self.tokens(stage.text, held_out=True))}
        return settings

    def train(self, stage, folder, progress):
        run, log = folder / "run", folder / "log.txt"
        if stage.batches and not self.laid_out(stage).is_file():
            LAYOUTS[stage.batches].write_tokens(self.tokens(stage.text), self.laid_out(stage), stage.settings)
        settings = self.run_settings(stage, self.input_of(stage), self.teacher_of(stage))
        write_whole(folder / "run.yaml", yaml.safe_dump(settings, sort_keys=False))
        if not (folder / ("eval.json" if stage.last else "model/config.json")).is_file():
            self.call([*self.program, "train", folder / "run.yaml"], log,
                      progress and (lambda: progress(last_step(run))))
            self.finish(stage, folder, log)
        facts = {"checkpoint_bytes": newest_bytes(run / "checkpoints")}
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        if not stage.last:
            facts["model_bytes"] = bytes_in(folder / "model")
        return facts

    def finish(self, stage, folder, log):
        if not stage.last:
            self.call([*self.program, "export", folder / "run", "--to", folder / "model", "--dtype", "fp32"], log)
            return
        found = self.call([*self.program, "eval", folder / "run", "--data", self.tokens(stage.text, held_out=True),
                           "--seq-len", stage.settings["data"]["seq_len"], "--sequences",
                           stage.settings["train"]["eval_sequences"]], log)
        write_whole(folder / "eval.json", found)

    def ensure(self, run, step=lambda stage: None, progress=None):
        """All of a run that is not there yet; step(stage) before each stage."""
        if self.finished(run.last):
            return
        for stage in run.stages:
            if not self.finished(stage):
                step(stage)
                self.perform(run, stage, progress)

    def ensure_or_diverge(self, run, step, progress):
        """ensure(); a last training that ends without a finite loss is finished too."""
        try:
            self.ensure(run, step, progress)
        except StageFailed as problem:
            if problem.status != NOT_FINITE or not all(self.finished(stage) for stage in run.stages[:-1]):
                raise
            shutil.rmtree(self.run_dir(run.last) / "checkpoints", ignore_errors=True)
            write_whole(self.place(run.last) / "done.json", json.dumps({"diverged": True}))

    def link_runs(self, runs):
        """FOLDER/runs has the runs that were compared by arm and seed, for `upmoe report`."""
        links = self.folder / "runs"
        shutil.rmtree(links, ignore_errors=True)
        links.mkdir()
        for run in runs:
            name = f"{folder_of(run.arm)}-seed{run.seed}"
            (links / name).symlink_to(os.path.relpath(self.run_dir(run.last), links))

    def drop_models(self, run, left):
        """Mixtures that none of the runs that are left begins with."""
        wanted = {stage.id for other in left for stage in other.stages}
        for stage in run.stages:
            if stage.kind == "upcycle" and stage.id not in wanted:
                shutil.rmtree(self.place(stage) / "model", ignore_errors=True)

    def finished_runs(self):
        """What done.json says of every finished last stage, of whatever form of the study."""
        records = [self.record(path.parent.name) for path in sorted((self.folder / "stages").glob("*/done.json"))]
        return [record for record in records if record and "story" in record]


def last_step(run):
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            steps = re.findall(rb'"step":\s*(\d+)', file.read())
    except OSError:
        return 0
    return int(steps[-1]) if steps else 0


# Of a complete one: a save that was interrupted or set aside leaves step_*.tmp and step_*.aside.
def newest_bytes(checkpoints):
    folders = [path for path in checkpoints.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return bytes_in(max(folders, key=lambda path: int(path.name[5:]))) if folders else 0
