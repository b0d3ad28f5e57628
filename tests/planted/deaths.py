"""A rank that dies or stops: how long until the job has noticed and ended, who is named, what is left."""

import re
import shutil
import time

from processes import Started
from subjects import Part, require
from tiny_run import mpirun, state_of

PHASES = ("forward", "exchange", "backward", "reduce", "optimizer", "save")
DEADLINE_S, GRACE_S = 2.0, 6.0  # the grace: for mpirun to end the others
STEP = 7


class Deaths(Part):
    """A trial: the last of two or three ranks dies or is stopped in one of six phases of a step or a save. The time is
    that from its death or stop to the end of mpirun."""

    name, count = "deaths", 24
    shows = (f"a death ends the job within {GRACE_S} s, a stopped rank within the deadline of {DEADLINE_S} s and that; "
             "the rank is named; no process is left")

    def __init__(self, program, seed):
        super().__init__(program, seed)
        self.ranks_program = program.build / "bin" / "fault_ranks"

    def trial(self, number, draw):
        phase, fault = PHASES[number % 6], ("kill", "stop")[number // 6 % 2]
        ranks, run = 2 + number // 12 % 2, self.program.dir / "struck"
        shutil.rmtree(run, ignore_errors=True)
        started = Started([*mpirun(ranks), self.ranks_program, self.program.dir / "run.yaml", phase, fault, ranks - 1,
                           10 if phase == "save" else STEP, int(DEADLINE_S * 1000), "train.steps=12",
                           "checkpoint.every=5", "checkpoint.async=false", f"parallel.ep={ranks}", f"run.dir={run}"],
                          self.program.dir / "said")
        try:
            seconds = self.seconds_to_end(started, ranks)
            started.require_gone(GRACE_S)
        finally:
            started.end()
        said, status = started.said(), started.process.returncode
        require(status != 0, f"ended with 0: {said}")
        if fault == "kill":
            require(seconds <= GRACE_S, f"noticed after {seconds:.2f} s")
            require(re.search(rf"process rank {ranks - 1} .*signal 9 \(Killed\)", said), f"not named: {said}")
        else:
            require(seconds <= DEADLINE_S + GRACE_S, f"noticed after {seconds:.2f} s")
            require(status == 70 and f"nothing yet from rank {ranks - 1}" in said, f"not named: {status}: {said}")
        return {fault: 1, f"seconds_after_{fault}": round(seconds, 3)}

    def seconds_to_end(self, started, ranks):
        pids, struck, end = [], None, time.monotonic() + 60
        while started.process.poll() is None:
            require(time.monotonic() < end, f"does not end: {started.said()}")
            if len(pids) < ranks:
                pids = started.pids(self.ranks_program)
            elif struck is None and any(state_of(pid) in "TtZX" for pid in pids):
                struck = time.monotonic()
            time.sleep(0.002)
        require(struck is not None, f"nothing happened: {started.said()}")
        return time.monotonic() - struck
