"""kill -9 at random moments of training, upcycling, exporting and tokenizing."""

import subprocess
import time

from processes import Started
from subjects import TIMEOUT_S, Part, Training, checkpoints_in, outputs_of, remove, require

MOST = 3  # kills of one run before it may end
END_S = 20  # for a launcher to end the other ranks


class Kills(Part):
    """A trial: one run of one or two ranks, killed up to three times and then left alone, or one output. Of two ranks,
    or a process and those that it started, all are killed or one."""

    name, count = "kills", 250
    shows = ("after each kill what has a checkpoint's name verifies; the run then ends with the losses and the last "
             "tensors of an undisturbed one, to the bit; an output is whole or not there; no process is left, and no "
             "file after the next success")

    def __init__(self, program, seed):
        super().__init__(program, seed)
        self.out = program.dir / "out"
        self.jobs = []
        for ranks in (1, 1, 2):  # with two it takes long to start
            training = Training(program, ranks)
            self.jobs.append((f"train_{ranks}", training, self.times(training)))
        for output in outputs_of(program):
            self.jobs.append((output.name, output, self.times(output)))

    def clear(self):
        for path in self.out.parent.glob(f"{self.out.name}*"):
            remove(path)

    def begins_to_write(self, started):
        while started.process.poll() is None and not any(self.out.parent.glob(f"{self.out.name}*")):
            time.sleep(0.001)

    def times(self, job):
        """Seconds until it begins to write, and from there to its end."""
        self.clear()
        began = time.monotonic()
        started = Started(job.words(self.out), self.program.dir / "said")
        self.begins_to_write(started)
        writes = time.monotonic()
        require(started.process.wait(TIMEOUT_S) == 0, f"without a kill: {started.said()}")
        return writes - began, time.monotonic() - writes

    def trial(self, number, draw):
        name, job, times = self.jobs[number % len(self.jobs)]
        self.clear()
        if not isinstance(job, Training):
            kills = self.kill(job, times, draw)
            job.finish(self.out)
            return {"kills": kills, name: kills}
        kills = 0
        for _ in range(MOST):
            kills += self.kill(job, times, draw)
            for checkpoint in checkpoints_in(self.out):
                self.program.verify(checkpoint)
        job.finish(self.out)
        return {"kills": kills, name: kills}

    def kill(self, job, times, draw):
        """1 when it was still at work at its moment, which mostly lies where it writes."""
        begun = self.out.exists()
        started = Started(job.words(self.out), self.program.dir / "said")
        seconds = draw.uniform(0, 1.1) * (sum(times) if begun else times[1])
        if not begun and draw.random() < 0.8:
            self.begins_to_write(started)
        try:
            started.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pids = started.pids()
            if draw.random() < 0.5:  # one of them, and the others end by themselves
                pids = [draw.choice(started.pids(self.program.upmoe) or [started.process.pid])]
            started.end(pids)
            started.require_gone(END_S)
            return 1
        started.require_gone(END_S)
        return 0
