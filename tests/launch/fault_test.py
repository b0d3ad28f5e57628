#!/usr/bin/env python3
"""A rank dies, or stops, in each phase of a step and of a save: the job ends soon and says why once, the newest
checkpoint is whole, and the same command goes on from it to the losses of a run that nothing happened to.

Needs UPMOE (the program), MAKE_RUN (writes the tiny model and data) and FAULT_RANKS in the environment.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
from tiny_run import ENVIRONMENT, losses_of, mpirun  # noqa: E402

UPMOE, MAKE_RUN, FAULT_RANKS = (os.environ[name] for name in ("UPMOE", "MAKE_RUN", "FAULT_RANKS"))
PHASES = ("forward", "exchange", "backward", "reduce", "optimizer", "save")
STEP, STEPS = 7, 12
DEADLINE_S, GRACE_S = 2.0, 6.0  # the grace: for mpirun to end the others
AT_ONCE = 2  # jobs: most of their time they start, wait for the deadline, or are being ended
EVERY_RUN = (f"train.steps={STEPS}", "checkpoint.every=5", "checkpoint.async=false")


def run_ranks(ranks, *command):
    return subprocess.run([*mpirun(ranks), *map(str, command)], capture_output=True, text=True, env=ENVIRONMENT,
                          timeout=120, check=False)


class OneRank(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dir = Path(tempfile.mkdtemp(prefix="upmoe-fault-"))
        subprocess.run([MAKE_RUN, str(cls.dir)], check=True)
        cls.undisturbed = {}

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.dir, ignore_errors=True)

    def train(self, ranks, run, *overrides):
        done = run_ranks(ranks, UPMOE, "train", self.dir / "run.yaml", *EVERY_RUN, *overrides, f"run.dir={run}")
        self.assertEqual(done.returncode, 0, done.stderr)
        return losses_of(run)

    def whole(self, ranks, overrides):
        """The losses of a run to which nothing happens, once for each layout."""
        key = (ranks, *overrides)
        if key not in self.undisturbed:
            self.undisturbed[key] = self.train(ranks, self.dir / f"whole{len(self.undisturbed)}", *overrides)
            self.assertEqual(sorted(self.undisturbed[key]), list(range(1, STEPS + 1)))
        return self.undisturbed[key]

    def strike(self, ranks, phase, fault, *overrides):
        """(status, what was said) of a run in which the last rank gets the fault; then it must go on."""
        whole = self.whole(ranks, overrides)
        run = Path(tempfile.mkdtemp(dir=self.dir))
        done = run_ranks(ranks, FAULT_RANKS, self.dir / "run.yaml", phase, fault, ranks - 1,
                         10 if phase == "save" else STEP, int(DEADLINE_S * 1000), *EVERY_RUN, *overrides,
                         f"run.dir={run}")
        ended = time.time()
        self.assertNotEqual(done.returncode, 0, "nothing happened")
        self.assertLess(ended - (run / "struck").stat().st_mtime, DEADLINE_S + GRACE_S + 3, done.stderr)
        self.assertLessEqual(done.stderr.count("upmoe: error:"), 1, done.stderr)
        checkpoints = sorted(p.name for p in (run / "checkpoints").glob("step_????????"))
        self.assertEqual(checkpoints, ["step_00000005"], done.stderr)
        verified = subprocess.run([UPMOE, "inspect", "--verify", run / "checkpoints" / checkpoints[-1]],
                                  capture_output=True, text=True, env=ENVIRONMENT, check=False)
        self.assertEqual(verified.returncode, 0, verified.stderr)
        reached = max(losses_of(run))
        self.assertIn(reached, (9, 10) if phase == "save" else (STEP - 1, STEP))
        self.assertEqual(self.train(ranks, run, *overrides), whole)
        shutil.rmtree(run)
        return done.returncode, done.stderr

    def strikes(self, *cases):
        """(case, what gives the result of its strike); a case is a strike's arguments."""
        for ranks, _, _, *overrides in cases:
            self.whole(ranks, tuple(overrides))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return [(case, pool.submit(self.strike, *case)) for case in cases]  # once all have ended

    def test_dies(self):
        ep, tp = "parallel.ep=2", "parallel.tp=2"
        for case, strike in self.strikes(*((2, phase, "kill", ep) for phase in PHASES),
                                         *((2, phase, "kill", ep, tp) for phase in ("backward", "reduce"))):
            with self.subTest(case=case):
                _, said = strike.result()
                self.assertRegex(said, r"process rank 1 .*signal 9 \(Killed\)")

    def test_stops(self):
        for case, strike in self.strikes(*((3, phase, "stop", "parallel.ep=3") for phase in PHASES)):
            with self.subTest(case=case):
                status, said = strike.result()
                self.assertEqual(status, 70, said)
                found = re.findall(r"upmoe: error: rank 0: no progress for [0-9.]+ s: the collective (\w+) "
                                   r"\(number \d+\) did not finish: nothing yet from rank (\d)", said)
                self.assertEqual([rank for _, rank in found], ["2"], said)


if __name__ == "__main__":
    unittest.main(verbosity=2)
