"""What faults are planted into: a tiny training run, and the commands that make one output; how each must look."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "support"))
from tiny_run import ENVIRONMENT, RECIPE, ROOT, losses_of, mpirun, write_dense  # noqa: E402

TIMEOUT_S = 120
REFUSALS = (2, 3)  # exit statuses of what the system does not let be read or written
TEXT = "def f(x):\n    return x + 1  # one more\n\nfor i in range(10):\n    print(f(i), 'done')\n" * 40


class Violation(Exception):
    """A fault was not met as it should be."""


class NotMeasured(Exception):
    """This machine or this user lacks what it takes."""


def require(condition, text):
    if not condition:
        raise Violation(text)


def content_of(path):
    """{name: digest} of a file or of all files in a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def remove(path):
    """A file or a folder with all in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def checkpoints_in(run_dir):
    """Folders under a checkpoint's name, oldest first."""
    folder = run_dir / "checkpoints"
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return [folder / name for name in names if re.fullmatch(r"step_\d{8}", name)]


def step_of(checkpoint):
    return int(checkpoint.name[5:])


class Part:
    """A kind of fault: trial(number, draw) plants some and returns counts, or throws Violation."""

    count = 0  # of trials, unless told
    most = sys.maxsize  # that there are

    def __init__(self, program, seed):
        self.program, self.seed = program, seed

    def numbers(self, first, count):
        return range(first, min(self.most, first + count) if count else self.count)


class Program:
    """A built program, and a folder with models, tokens and a run file for it."""

    def __init__(self, build, folder):
        self.build, self.upmoe, self.dir = build, build / "upmoe", folder
        subprocess.run([build / "bin" / "make_run", folder], check=True)
        write_dense(folder / "dense")
        (folder / "recipe.yaml").write_text(RECIPE)

    def run(self, *words, before=(), **options):
        return subprocess.run([*map(str, before), *map(str, words)], capture_output=True, text=True, errors="replace",
                              env=ENVIRONMENT, timeout=TIMEOUT_S, check=False, **options)

    def verify(self, path):
        done = self.run(self.upmoe, "inspect", "--verify", path)
        require(done.returncode == 0, f"{path} under its final name does not verify: {done.stderr}")

    def require_refusal(self, done):
        require(done.returncode in REFUSALS, f"ended with {done.returncode}: {done.stderr[-2000:]}")
        require(done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, f"said: {done.stderr[-2000:]}")


class Training:
    """A run that saves after each step, and what it must have come to whatever happened on the way."""

    def __init__(self, program, ranks=1, steps=12, keep=2):
        self.program, self.ranks, self.steps, self.keep = program, ranks, steps, keep
        whole = program.dir / f"whole_{ranks}"
        done = program.run(*self.words(whole))
        if done.returncode != 0:
            raise SystemExit(f"the program does not train: {done.stderr}")
        self.losses, self.last = losses_of(whole), self.shards(whole)
        assert sorted(self.losses) == list(range(1, steps + 1))

    def words(self, run_dir, *overrides):
        return [*mpirun(self.ranks), self.program.upmoe, "train", self.program.dir / "run.yaml",
                f"parallel.ep={self.ranks}", f"train.steps={self.steps}", "checkpoint.every=1",
                f"checkpoint.keep={self.keep}", f"run.dir={run_dir}", *overrides]

    def shards(self, run_dir):
        """The tensors of the last step: the files beside them name run.dir."""
        last = run_dir / f"checkpoints/step_{self.steps:08}"
        return {name: digest for name, digest in content_of(last).items() if name.startswith("shard_")}

    def require_finished(self, run_dir, every_loss=True, tidy=True):
        """`every_loss`: no step's line may be missing from the metrics; `tidy`: nothing older may be left."""
        found = losses_of(run_dir)
        expected = self.losses if every_loss else {s: v for s, v in self.losses.items() if s in found}
        require(found == expected, f"other losses: {found}, expected {expected}")
        require(self.shards(run_dir) == self.last, "the last checkpoint holds other values")
        names = sorted(p.name for p in (run_dir / "checkpoints").iterdir() if ".aside" not in p.name)
        kept = [p.name for p in checkpoints_in(run_dir)]
        require(kept[-1:] == [f"step_{self.steps:08}"] and len(kept) >= self.keep, f"kept: {kept}")
        require(not tidy or (names == kept and len(kept) == self.keep), f"left: {names}")

    def finish(self, run_dir, every_loss=True):
        """Starts it again, with nothing in its way; what it said."""
        done = self.program.run(*self.words(run_dir))
        require(done.returncode == 0, f"cannot go on: {done.returncode}: {done.stderr}")
        self.require_finished(run_dir, every_loss, tidy="nothing to do" not in done.stderr)
        self.program.verify(run_dir)
        return done.stderr


class Output:
    """A command with one output, which must be there whole or not at all."""

    def __init__(self, program, name, words):
        self.program, self.name, self.given = program, name, words
        self.whole = program.dir / f"whole_{name}"
        done = program.run(*self.words(self.whole))
        if done.returncode != 0:
            raise SystemExit(f"{name} does not work: {done.stderr}")
        self.content = content_of(self.whole)
        require(not self.leftovers(self.whole), f"{name} leaves {self.leftovers(self.whole)}")

    def words(self, to):
        return [to if word is Output else word for word in self.given]

    def leftovers(self, to):
        """What stands beside the output under names that begin with its own."""
        return sorted(p.name for p in to.parent.iterdir() if p.name.startswith(f"{to.name}."))

    def clear(self, to):
        """For a trial from the beginning."""
        for name in [to.name, *self.leftovers(to)]:
            remove(to.with_name(name))

    def is_there(self, to):
        """Violation: something else than the whole is."""
        if not os.path.lexists(to):
            return False
        require(content_of(to) == self.content, f"{to} is visible and not whole: {sorted(content_of(to))}")
        return True

    def finish(self, to):
        """Makes it, anew where it is there already; then nothing else may be left."""
        if self.is_there(to):
            remove(to)
        done = self.program.run(*self.words(to))
        require(done.returncode == 0, f"the same command fails: {done.returncode}: {done.stderr}")
        require(self.is_there(to), "nothing was made")
        require(not self.leftovers(to), f"left after the next success: {self.leftovers(to)}")


def outputs_of(program):
    """upcycling in both forms, an export, a token file."""
    upmoe, here = program.upmoe, program.dir
    (here / "text.txt").write_text(TEXT)
    tokenize = [sys.executable, ROOT / "data/tokenize.py", "--tokenizer", here / "bpe.json"]
    made = program.run(*tokenize, "--train-vocab", 400, here / "text.txt")
    if made.returncode != 0:
        raise SystemExit(f"no tokenizer: {made.stderr}")
    upcycle = [upmoe, "upcycle", here / "recipe.yaml", "--from", here / "dense", "--to", Output]
    return [Output(program, "upcycle", upcycle),
            Output(program, "upcycle_checkpoint", [*upcycle, "--form", "checkpoint"]),
            Output(program, "export", [upmoe, "export", here / "whole_upcycle_checkpoint", "--to", Output]),
            Output(program, "tokenize", [*tokenize, "--out", Output, "--processes", 1, here / "text.txt"])]
