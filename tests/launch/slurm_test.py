#!/usr/bin/env python3
"""launch/run_slurm.sbatch with a false srun and scontrol (see restart_test.py)."""

import signal
import subprocess
import unittest

from restart_test import LAUNCH, STAMP, Case


class Slurm(Case):
    def setUp(self):
        super().setUp()
        self.environment |= {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "5", "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
                             "UPMOE_RESTART_DELAY": "0"}

    def batch(self, *command):
        return self.start(["bash", str(LAUNCH / "run_slurm.sbatch"), *(command or self.training)])

    def requeued(self):
        path = self.dir / "scontrol"
        return path.read_text() if path.exists() else ""

    def test_shellcheck(self):
        run = subprocess.run(["shellcheck", "--severity=warning", str(LAUNCH / "run_slurm.sbatch")],
                             capture_output=True, text=True)
        self.assertEqual(run.stdout, "")

    def test_wrong_use(self):
        self.assertIn("run_slurm: error:", self.finish(self.batch("upmoe", "doctor"), 2))
        self.assertIn("UPMOE_RUN_DIR", self.finish(self.batch("upmoe", "train", "missing.yaml"), 2))
        self.environment["SLURM_SUBMIT_DIR"] = str(self.dir)
        self.assertIn("UPMOE_ROOT", self.finish(self.batch(), 2))
        del self.environment["SLURM_JOB_ID"]
        self.assertIn("sbatch", self.finish(self.batch(), 2))
        self.assertEqual(self.calls(), [])

    def test_a_run_that_ends_well(self):
        self.starts("exit 0")
        self.finish(self.batch(), 0)
        self.assertEqual(self.calls(), ["5 | --mpi=pmix --kill-on-bad-exit=1 --cpus-per-task=5 --cpu-bind=cores "
                                        + " ".join(self.training)])
        self.assertEqual(self.requeued(), "")
        del self.environment["SLURM_CPUS_PER_TASK"]  # of --cpus-per-gpu, which a number of ours would overrule
        self.starts("exit 99", "exit 0")
        self.finish(self.batch(), 0)
        self.assertEqual(self.calls()[1],
                         " | --mpi=pmix --kill-on-bad-exit=1 --cpu-bind=cores " + " ".join(self.training))

    def test_restarts_within_the_allocation(self):
        self.starts("save 10; exit 70", "save 20; exit 137", "exit 137")
        errors = self.finish(self.batch(), 137)
        self.assertIn("no newer checkpoint", errors)
        for line in errors.splitlines():
            self.assertRegex(line, rf"^{STAMP}run_slurm: ")
        self.assertEqual(len(self.calls()), 3)
        self.assertEqual(self.requeued(), "")

    def test_final_statuses(self):
        self.starts("save 10; exit 4")
        self.finish(self.batch(), 4)
        self.assertEqual(len(self.calls()), 1)

    def test_the_time_limit_saves_and_requeues(self):
        self.save(10)
        self.starts("on_usr2 'sleep 0.3; save 20; exit 75'")
        process = self.batch()
        self.wait_until_ready(process)
        process.send_signal(signal.SIGUSR1)
        self.finish(process, 0)
        self.assertEqual(self.requeued(), "requeue 42\n")
        self.assertEqual(len(self.calls()), 1)

    def test_a_preempted_job_goes_back_into_the_queue(self):
        # As Slurm 22.05 prints it: of a job that is not preempted too it has a time from when on it might be.
        job = "   SuspendTime=None SecsPreSuspend=0 PreemptEligibleTime=2026-11-30T07:19:59 PreemptTime={}\n"
        for time_of_it, status, requeued in (("2026-11-30T07:20:04", 0, "requeue 42\n"), ("None", 75, "")):
            with self.subTest(time_of_it):
                for name in ("count", "calls", "scontrol"):
                    (self.dir / name).unlink(missing_ok=True)
                (self.dir / "job").write_text(job.format(time_of_it))
                self.starts("exit 75")
                self.finish(self.batch(), status)
                self.assertEqual(self.requeued(), requeued)

    def test_no_requeue_without_progress_or_when_done(self):
        for end, status in (("exit 75", 75), ("save 20; exit 0", 0), ("save 30; exit 4", 4)):
            with self.subTest(end):
                for name in ("count", "calls", "ready"):
                    (self.dir / name).unlink(missing_ok=True)
                self.starts(f"on_usr2 '{end}'")
                process = self.batch()
                self.wait_until_ready(process)
                process.send_signal(signal.SIGUSR1)
                self.finish(process, status)
                self.assertEqual(self.requeued(), "")

    def test_cancelled_saves_and_is_not_requeued(self):
        self.starts("on_usr2 'save 20; exit 75'")
        process = self.batch()
        self.wait_until_ready(process)
        process.send_signal(signal.SIGTERM)
        self.finish(process, 75)
        self.assertEqual(self.requeued(), "")


if __name__ == "__main__":
    unittest.main()
