"""When a job is started again, and how the launch scripts do it: with an mpirun, srun and scontrol that only pretend.

usage: restart_test.py SOURCE_DIR
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(sys.argv.pop(1))
# Plays the statuses of $PLAN one by one; "75+" also leaves a new checkpoint, "wait" waits for USR2 and then saves.
FAKE = """#!/usr/bin/env bash
cd "$FAKE_DIR"
echo "$*" >>calls
n=$(wc -l <calls)
word=$(cut -d' ' -f"$n" <<<"$PLAN")
save() { mkdir -p run/checkpoints/step_0000000$n; }
if [[ $word == wait ]]; then
  trap 'save; exit 75' USR2
  touch ready
  for _ in $(seq 200); do sleep 0.05; done
  exit 99
fi
[[ $word == *+ ]] && save
exit "${word%+}"
"""


class Restart(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.dir = Path(self.folder.name)
        for name in ("mpirun", "srun"):
            (self.dir / name).write_text(FAKE, encoding="utf-8")
            (self.dir / name).chmod(0o755)
        (self.dir / "scontrol").write_text('#!/bin/sh\necho "$*" >"$FAKE_DIR/requeued"\n', encoding="utf-8")
        (self.dir / "scontrol").chmod(0o755)
        (self.dir / "hosts").write_text("# two\nnode1 slots=2\nnode2 slots=3\n", encoding="utf-8")
        (self.dir / "run.yaml").write_text(f"run: {{dir: {self.dir}/run, seed: 1}}\n", encoding="utf-8")

    def tearDown(self):
        self.folder.cleanup()

    def environment(self, plan):
        return dict(os.environ, PATH=f"{self.dir}:{os.environ['PATH']}", FAKE_DIR=str(self.dir), PLAN=plan,
                    SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="3")

    def calls(self):
        return (self.dir / "calls").read_text(encoding="utf-8").splitlines()

    def hosts(self, plan, *options):
        command = [ROOT / "launch/run_hosts.sh", "--hostfile", self.dir / "hosts", *options, "upmoe", "train",
                   self.dir / "run.yaml"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=self.environment(plan),
                              check=False)
        return done.returncode, done.stderr

    def test_starts_all_slots_with_the_deadline(self):
        status, _ = self.hosts("0", "--deadline", "30", "--interface", "10.0.0.0/24")
        self.assertEqual(status, 0)
        self.assertIn("-np 5 ", self.calls()[0])
        self.assertIn("btl_tcp_if_include 10.0.0.0/24", self.calls()[0])
        self.assertTrue(self.calls()[0].endswith("--deadline 30"))

    def test_faults_are_tried_again_and_mistakes_are_not(self):
        for plan, status, starts in (("70+ 72+ 0", 0, 3), ("1+ 0", 0, 2), ("1", 1, 1), ("2", 2, 1), ("3", 3, 1),
                                     ("4+", 4, 1), ("75+", 75, 1), ("137+ 0", 0, 2), ("70 70 70 70", 70, 3),
                                     ("70 70+ 70 70 0", 0, 5)):
            with self.subTest(plan=plan):
                self.tearDown()
                self.setUp()
                found, error = self.hosts(plan)
                self.assertEqual((found, len(self.calls())), (status, starts), error)
                if status != 0:
                    self.assertIn(f"status {status}", error)

    def test_gives_up_after_so_many_restarts(self):
        status, error = self.hosts("70+ 70+ 70+ 70+", "--restarts", "2")
        self.assertEqual((status, len(self.calls())), (70, 3))
        self.assertIn("after 2 restarts", error)

    def test_wrong_arguments(self):
        for options, words in ((("--restarts", "x"), "--restarts"), (("--hostfile", "/nowhere"), "/nowhere"),
                               (("--colour", "red"), "--colour")):
            status, error = self.hosts("0", *options)
            self.assertEqual(status, 2)
            self.assertIn(words, error)

    def slurm(self, plan):
        return subprocess.Popen(["bash", ROOT / "launch/run_slurm.sbatch", "upmoe", "train", self.dir / "run.yaml"],
                                stderr=subprocess.PIPE, text=True, env=self.environment(plan))

    def test_slurm_restarts_after_a_fault(self):
        job = self.slurm("70+ 0")
        error = job.communicate(timeout=60)[1]
        self.assertEqual((job.returncode, len(self.calls())), (0, 2), error)
        self.assertIn("--mpi=pmix", self.calls()[0])

    def test_slurm_saves_before_the_limit_and_goes_back_into_the_queue(self):
        job = self.slurm("wait")
        for _ in range(200):
            if (self.dir / "ready").exists():
                break
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        error = job.communicate(timeout=60)[1]
        self.assertEqual(job.returncode, 0, error)
        self.assertEqual((self.dir / "requeued").read_text(encoding="utf-8"), "requeue 7\n")


if __name__ == "__main__":
    unittest.main()
