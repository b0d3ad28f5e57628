#!/usr/bin/env python3
"""Whole runs of the program under faults: kills, signals, hangs, bad data, a full disk.

Needs UPMOE (the program) and MAKE_RUN (writes the tiny model and data) in the environment.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

for shared in ("support", "bench"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / shared))
from bench_record import write_tokens  # noqa: E402
from tiny_run import ENVIRONMENT, mpirun  # noqa: E402

UPMOE, MAKE_RUN = os.environ["UPMOE"], os.environ["MAKE_RUN"]
LONG = "train.steps=100000"


class Run(unittest.TestCase):
    def setUp(self):
        self.dir = Path(tempfile.mkdtemp(prefix="upmoe-run-"))
        subprocess.run([MAKE_RUN, str(self.dir)], check=True)
        self.started = []

    def tearDown(self):
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                stream.close()
        shutil.rmtree(self.dir, ignore_errors=True)

    def start(self, *overrides, ranks=2, options=(), environment=None):
        process = subprocess.Popen(
            [*mpirun(ranks), UPMOE, "train", str(self.dir / "run.yaml"), *map(str, options),
                      *(("parallel.ep=1",) if ranks == 1 else ()), *overrides],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment or ENVIRONMENT)
        self.started.append(process)
        return process

    def finish(self, process, status, timeout=90):
        _, errors = process.communicate(timeout=timeout)
        self.assertEqual(process.returncode, status, errors)
        return errors

    def metrics(self, run="run"):
        path = self.dir / run / "metrics.jsonl"
        lines = []
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                pass  # the last line may be torn while the job runs
        return {m["step"]: m["loss"] for m in lines if "loss" in m}

    def wait_for_step(self, step, process, run="run", timeout=60):
        end = time.monotonic() + timeout
        while max(self.metrics(run), default=0) < step:
            self.assertIsNone(process.poll(), "the job ended early")
            self.assertLess(time.monotonic(), end, f"step {step} was not reached")
            time.sleep(0.02)

    def checkpoints(self, run="run"):
        return sorted(p.name for p in (self.dir / run / "checkpoints").glob("step_????????"))

    def rank_pids(self, process):
        children = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(process.pid)],
                                  capture_output=True, text=True)
        return [int(line.split()[0]) for line in children.stdout.splitlines() if "upmoe" in line]

    def test_killed_rank_ends_the_job_and_the_run_resumes_bitwise(self):
        self.finish(self.start(f"run.dir={self.dir}/whole"), 0)
        process = self.start("train.steps=40")
        self.wait_for_step(12, process)
        os.kill(self.rank_pids(process)[1], signal.SIGKILL)
        process.communicate(timeout=30)
        self.assertNotEqual(process.returncode, 0)
        self.assertTrue(self.checkpoints(), "no checkpoint survived")
        self.finish(self.start("train.steps=40"), 0)
        self.assertEqual(self.metrics("whole"), self.metrics())

    def test_usr1_saves_and_goes_on_usr2_stops_with_75(self):
        process = self.start(LONG, "checkpoint.every=0")
        self.wait_for_step(3, process)
        process.send_signal(signal.SIGUSR1)
        end = time.monotonic() + 30
        while not self.checkpoints():
            self.assertLess(time.monotonic(), end, "SIGUSR1 made no checkpoint")
            time.sleep(0.05)
        self.assertIsNone(process.poll())
        process.send_signal(signal.SIGUSR2)
        self.finish(process, 75)
        last = max(self.metrics())
        self.assertEqual(self.checkpoints()[-1], f"step_{last:08}")
        self.finish(self.start(f"train.steps={last + 2}"), 0)
        self.assertEqual(max(self.metrics()), last + 2)

    def test_terminated_alone_saves_and_returns_75(self):
        process = self.start(LONG, ranks=1)
        self.wait_for_step(3, process)
        process.send_signal(signal.SIGTERM)
        self.finish(process, 75)
        self.assertEqual(self.checkpoints()[-1], f"step_{max(self.metrics()):08}")

    def test_a_stopped_rank_is_a_hang(self):
        process = self.start(LONG, options=("--deadline", "3"))
        self.wait_for_step(3, process)
        os.kill(self.rank_pids(process)[1], signal.SIGSTOP)
        errors = self.finish(process, 70, timeout=30)
        self.assertRegex(errors, r"(?i)no progress|hang|collective")

    # On one rank, where nothing is exchanged: its micro-batches, their ops and what is read for them are the progress.
    # The evaluation before the first step is endless, and is looked at when it has outlasted the deadline: that is
    # longer than a busy machine or its disk keeps a thread from going on, and no rate has to be known beforehand.
    def test_a_long_evaluation_is_no_hang(self):
        config = json.loads((self.dir / "model/config.json").read_text()) | {"num_hidden_layers": 16}
        (self.dir / "model/config.json").write_text(json.dumps(config))
        sequences, deadline = 2000000, 10  # of one token each
        write_tokens(self.dir / "valid.h5", config["vocab_size"], sequences + 1)
        process = self.start("train.steps=1", "data.seq_len=1", f"data.valid={self.dir}/valid.h5",
                             f"train.eval_sequences={sequences}", ranks=1, options=("--deadline", deadline))
        end = time.monotonic() + 60
        while not (self.dir / "run/starts.jsonl").exists():  # written just before it
            self.assertIsNone(process.poll(), "the job ended early")
            self.assertLess(time.monotonic(), end, "the run did not start")
            time.sleep(0.02)
        try:
            _, errors = process.communicate(timeout=1.5 * deadline)
            self.fail(f"ended with {process.returncode}: {errors}")
        except subprocess.TimeoutExpired:
            self.assertNotIn('"eval"', (self.dir / "run/metrics.jsonl").read_text())

    # On a busy machine threads that search without end cost a step five times its time (tests/bench/busy_machine.py).
    def test_idle_threads_search_for_work_for_a_moment_unless_told_otherwise(self):
        waits = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        plain = {name: value for name, value in ENVIRONMENT.items() if name not in waits}
        for given, expected in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)):
            run = "run" + "".join(given)
            process = self.start(LONG, f"run.dir={self.dir}/{run}", ranks=1, environment=plain | given)
            self.wait_for_step(1, process, run)
            found = Path(f"/proc/{process.pid}/environ").read_text(errors="replace").split("\0")
            self.assertEqual([entry for entry in found if entry.startswith("GOMP_SPINCOUNT=")],
                             [f"GOMP_SPINCOUNT={expected}"] if expected else [])
            process.kill()

    def test_token_beyond_the_vocabulary(self):
        errors = self.finish(self.start(f"data.train=[{{path: {self.dir}/poisoned.h5}}]", "train.steps=200"), 3)
        self.assertIn("poisoned.h5", errors)
        self.assertEqual(errors.count("error:"), 1, errors)

    def test_second_job_in_one_run_directory(self):
        first = self.start(LONG)
        self.wait_for_step(2, first)
        errors = self.finish(self.start(LONG), 2)
        self.assertIn("another job", errors)
        self.assertEqual(errors.count("error:"), 1, errors)
        self.assertIsNone(first.poll())

    def test_non_finite_loss(self):
        errors = self.finish(self.start("optimizer.lr=1e30", "optimizer.clip=0"), 4)
        self.assertEqual(errors.count("error:"), 1, errors)

    @unittest.skipUnless(os.geteuid() == 0, "mounting needs root")
    def test_hosts_with_files_of_their_own(self):
        """Each rank starts in a folder of its own, whose files have the same names."""
        run = (self.dir / "run.yaml").read_text()
        for word in ("model", "tokens.h5"):
            run = run.replace(f"path: {self.dir}/{word}", f"path: {word}")
        (self.dir / "run.yaml").write_text(run)
        folders = [self.dir / "0", self.dir / "1"]
        for folder in folders:
            folder.mkdir()
            shutil.copytree(self.dir / "model", folder / "model")
            shutil.copy(self.dir / "tokens.h5", folder)
        command = [*mpirun(2), "sh", "-c", 'cd "$0/$OMPI_COMM_WORLD_RANK" && exec "$@"', str(self.dir), UPMOE, "train",
                   str(self.dir / "run.yaml"), "train.steps=2", "--deadline", "20"]

        def told(status):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90, env=ENVIRONMENT)
            self.assertEqual(done.returncode, status, done.stderr)
            return done.stderr

        write_tokens(folders[1] / "tokens.h5", 64, 5000)
        self.assertRegex(told(2), r"different training data: .*tokens 20000.*, rank 1 '.*tokens 5000")
        config = (folders[1] / "model/config.json").read_text()
        (folders[1] / "model/config.json").write_text(config.replace("10000.0", "20000.0"))
        self.assertRegex(told(2), r"different copies of model.path.*rope_theta.*10000.*, rank 1 .*rope_theta.*20000")
        for name in ("model/config.json", "tokens.h5"):
            shutil.copy(folders[0] / name, folders[1] / name)
        told(0)

    def test_full_disk_keeps_training_and_the_older_checkpoint(self):
        disk = self.dir / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            self.skipTest("no tmpfs can be mounted here")
        try:
            # keep=9 checkpoints of about 1 MB each do not fit: the first ones do, the later ones fail, and the last one
            # takes the place of the oldest.
            process = self.start(f"run.dir={disk}/run", "train.steps=30", "checkpoint.keep=9")
            _, errors = process.communicate(timeout=90)
            kept = sorted(p.name for p in (disk / "run/checkpoints").glob("step_????????"))
            self.assertIn("failed, training goes on", errors)
            self.assertEqual(process.returncode, 0, errors)
            self.assertEqual(len(self.metrics("disk/run")), 30)
            self.assertEqual(kept[-1], "step_00000030")
            verify = subprocess.run([UPMOE, "inspect", "--verify", str(disk / "run/checkpoints" / kept[-1])],
                                    capture_output=True, text=True, env=ENVIRONMENT)
            self.assertEqual(verify.returncode, 0, verify.stderr)
            self.assertNotIn("none can be written", errors)
            # Where not even one fits, that is said before the first step.
            shutil.rmtree(disk / "run")
            (disk / "filler").write_bytes(b"0" * 2_600_000)
            process = self.start(f"run.dir={disk}/run", "train.steps=1")
            _, errors = process.communicate(timeout=90)
            self.assertRegex(errors, r"takes 1\.1 MB of disk, and 0\.5 MB are free: none can be written[^$]*step 1/1")
            self.assertEqual(process.returncode, 3, errors)
        finally:
            subprocess.run(["umount", str(disk)], check=True)


if __name__ == "__main__":
    unittest.main(verbosity=2)
