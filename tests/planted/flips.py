"""Single bits flipped in checkpoints and token files: found, with words, or without any effect."""

import json
import shutil

from subjects import Part, Training, outputs_of, require
from tiny_run import write_dense

STEPS_BEFORE = 6  # of the run that is resumed from damaged checkpoints


def flip(path, draw, within=None):
    """One bit of the file, or of so many first bytes of it; what to call it."""
    content = bytearray(path.read_bytes())
    byte, bit = draw.randrange(min(within or len(content), len(content))), draw.randrange(8)
    content[byte] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name} byte {byte} bit {bit}"


class Flips(Part):
    """A trial: one flip in a checkpoint for inspect --verify, one in a token file, and each fifth time one in the
    newest checkpoint of a run that goes on. Files are chosen first, bytes then, so that small files get their share."""

    name, count = "flips", 600
    shows = ("inspect --verify and a resume notice every flip in a checkpoint; a token file with a flip is refused, or "
             "says and evaluates to the same as before")

    def __init__(self, program, seed):
        super().__init__(program, seed)
        self.training = Training(program)
        self.begun = program.dir / "begun"
        self.done(program.run(*self.training.words(self.begun, f"train.steps={STEPS_BEFORE}")))
        tokenized = next(output for output in outputs_of(program) if output.name == "tokenize").whole
        write_dense(program.dir / "larger", vocab_size=400)
        self.token_files = [(path, model, self.inspected(path), self.evaluated(path, model))
                            for path, model in ((program.dir / "tokens.h5", self.begun),
                                                (tokenized, program.dir / "larger"))]

    def done(self, command):
        require(command.returncode == 0, f"without any flip: {command.stderr}")
        return command.stdout

    def inspect(self, path):
        return self.program.run(self.program.upmoe, "inspect", "--verify", "--json", path)

    def inspected(self, path):
        return json.loads(self.done(self.inspect(path)))

    def evaluated(self, tokens, model):
        """The loss of `model` over all of them."""
        done = self.program.run(self.program.upmoe, "eval", model, "--data", tokens, "--seq-len", 32, "--sequences", 0)
        return json.loads(self.done(done))["loss"]

    def trial(self, number, draw):
        found = {"checkpoint_flips": 1, "token_file_flips": 1}
        self.in_checkpoint(draw)
        found["token_files_refused" if self.in_token_file(draw) else "token_files_same"] = 1
        if number % 5 == 0:
            self.at_resume(draw)
            found["resume_flips"] = 1
        return found

    def in_checkpoint(self, draw):
        folder = self.program.dir / "step_00000006"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.begun / "checkpoints/step_00000006", folder)
        what = flip(draw.choice(sorted(folder.iterdir())), draw)
        done = self.inspect(folder)
        require(done.returncode == 3, f"{what}: inspect --verify ended with {done.returncode}: {done.stderr}")
        self.program.require_refusal(done)

    def in_token_file(self, draw):
        tokens, model, says, loss = draw.choice(self.token_files)
        path = self.program.dir / "flipped.h5"
        shutil.copyfile(tokens, path)
        # Most bytes are tokens; what lies at the beginning steers the library.
        what = flip(path, draw, within=draw.choice((None, 6000)))
        done = self.inspect(path)
        if done.returncode != 0:
            self.program.require_refusal(done)
            return True
        require(json.loads(done.stdout) == says, f"{what}: accepted, and says {done.stdout}")
        require(self.evaluated(path, model) == loss, f"{what}: accepted, with other tokens")
        return False

    def at_resume(self, draw):
        run = self.program.dir / "resumed"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.begun, run)
        newest = run / f"checkpoints/step_{STEPS_BEFORE:08}"
        what = flip(draw.choice(sorted(newest.iterdir())), draw)
        said = self.training.finish(run)
        for words in (f"checkpoint {newest} is not usable and is passed over",
                      f"resuming from {run}/checkpoints/step_{STEPS_BEFORE - 1:08} (step {STEPS_BEFORE - 1})"):
            require(words in said, f"{what}: not said: {words!r}: {said}")
        require((run / f"checkpoints/{newest.name}.aside").is_dir(), f"{what}: not set aside")
