#!/usr/bin/env python3
"""What run_local.sh does with signals, around a false mpirun (see restart_test.py), and around a real one where UPMOE
(the program) and MAKE_RUN (writes the tiny model and data) are in the environment."""

import json
import os
import signal
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

from restart_test import LAUNCH, Case

sys.path.append(str(LAUNCH.parent / "tests/support"))
from tiny_run import state_of  # noqa: E402


class Local(Case):
    """A grace that another layer would cut short: mpirun alone kills the ranks a second after SIGTERM."""

    def local(self, *command, grace="120"):
        process = self.start([str(LAUNCH / "run_local.sh"), "--grace", grace, "2", *(command or self.training)])
        self.wait_until_ready(process)
        return process

    def test_a_request_to_stop_reaches_the_ranks_as_one_to_save(self):
        for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
            with self.subTest(sent):
                for name in ("count", "calls", "ready"):
                    (self.dir / name).unlink(missing_ok=True)
                self.starts("on_usr2 'sleep 2; save 10; exit 75'")
                process = self.local()
                process.send_signal(sent)
                self.finish(process, 75)
                self.assertTrue((self.dir / "run/checkpoints/step_00000010").exists())

    def test_the_same_signal_twice_in_a_moment_is_one_request(self):
        self.starts("on_usr2 'sleep 1; exit 75'")
        process = self.local()
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
        self.finish(process, 75)

    def test_a_second_request_ends_at_once_and_so_does_the_end_of_the_grace(self):
        for grace, again in (("120", True), ("1", False)):
            with self.subTest(grace):
                for name in ("count", "calls", "ready"):
                    (self.dir / name).unlink(missing_ok=True)
                self.starts("on_usr2 :")
                process = self.local(grace=grace)
                process.send_signal(signal.SIGTERM)
                if again:
                    time.sleep(0.7)
                    process.send_signal(signal.SIGTERM)
                self.assertIn("status 143", self.finish(process, 143))

    def test_what_saves_nothing_is_ended_at_once(self):
        self.starts("on_usr2 'exit 75'")
        process = self.local("upmoe", "upcycle")
        process.send_signal(signal.SIGTERM)
        self.finish(process, 143)

    def test_a_request_to_save_is_passed_on(self):
        self.starts("trap 'save 3; exit 0' USR1; on_usr2 'exit 99'")
        process = self.local()
        process.send_signal(signal.SIGUSR1)
        self.finish(process, 0)
        self.assertTrue((self.dir / "run/checkpoints/step_00000003").exists())

    def test_the_launcher_ends_with_a_script_that_was_killed(self):
        self.starts(f"echo $$ >{self.dir}/pid; on_usr2 :")
        process = self.local()
        process.kill()
        process.communicate(timeout=60)
        pid, end = int((self.dir / "pid").read_text()), time.monotonic() + 20
        while state_of(pid) != "Z":
            self.assertLess(time.monotonic(), end, "mpirun was left alone")
            time.sleep(0.05)

    def test_the_input_is_the_command_s(self):
        self.starts("cat; exit 5")
        process = subprocess.run([str(LAUNCH / "run_local.sh"), "2", "cat"], input="words", capture_output=True,
                                 text=True, env=self.environment, cwd=self.dir, check=False, timeout=60)
        self.assertEqual((process.returncode, process.stdout), (5, "words"))


@unittest.skipUnless("UPMOE" in os.environ, "UPMOE is not set: the program was not built")
class Ranks(unittest.TestCase):
    def test_a_step_longer_than_the_launcher_s_patience_is_finished_and_saved(self):
        directory = tempfile.mkdtemp(prefix="upmoe-grace-")
        self.addCleanup(shutil.rmtree, directory, True)
        subprocess.run([os.environ["MAKE_RUN"], directory], check=True)
        for batch in (4096, 16384, 65536):  # until a step is longer than that, whatever the machine
            run = Path(directory, f"run_{batch}")
            metrics = run / "metrics.jsonl"
            process = subprocess.Popen(
                [LAUNCH / "run_local.sh", "2", os.environ["UPMOE"], "train", f"{directory}/run.yaml", "parallel.ep=1",
                 "train.steps=1000", f"train.global_batch={batch}", "train.micro_batch=1", "checkpoint.every=0",
                 f"run.dir={run}"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            self.addCleanup(lambda process=process: process.poll() is None and process.kill())
            while not metrics.exists() or not metrics.read_text():
                self.assertIsNone(process.poll())
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=240)
            self.assertEqual(process.returncode, 75, errors)
            last = json.loads(metrics.read_text().splitlines()[-1])
            self.assertTrue((run / f"checkpoints/step_{last['step']:08}").exists(), errors)
            if last["seconds"] > 1:
                break
        self.assertGreater(last["seconds"], 1, "mpirun would have waited for so short a step")


if __name__ == "__main__":
    unittest.main()
