#!/usr/bin/env python3
"""The program beside bad checkpoints and on bad disks: what is good is used and kept, what is not is said.

Needs UPMOE (the program) and MAKE_RUN (writes the tiny model and data) in the environment. Faults of single system
calls are made by strace where it is installed.
"""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
from safetensors_file import read_safetensors  # noqa: E402
from tiny_run import ENVIRONMENT, mount_tmpfs, strace, why_no_strace  # noqa: E402

UPMOE, MAKE_RUN = os.environ["UPMOE"], os.environ["MAKE_RUN"]
NOBODY = 65534


class Recovery(unittest.TestCase):
    def setUp(self):
        self.dir = Path(tempfile.mkdtemp(prefix="upmoe-recovery-"))
        self.addCleanup(shutil.rmtree, self.dir, True)
        subprocess.run([MAKE_RUN, str(self.dir)], check=True)
        self.run_dir = self.dir / "run"

    def upmoe(self, *words, status=0, before=()):
        done = subprocess.run([*before, UPMOE, *map(str, words)], capture_output=True, text=True, env=ENVIRONMENT,
                              cwd=self.dir, timeout=120, check=False)
        self.assertEqual(done.returncode, status, done.stderr)
        if status not in (0, 75):
            self.assertEqual(done.stderr.count("error:"), 1, done.stderr)
        return done

    def train(self, *overrides, status=0, before=()):
        return self.upmoe("train", self.dir / "run.yaml", "parallel.ep=1", *overrides, status=status,
                          before=before).stderr

    def fault(self, *filters):
        """The words before a command that make the kernel refuse some of its calls."""
        if reason := why_no_strace():
            self.skipTest(reason)
        return strace(*filters)

    def step(self, number):
        return self.run_dir / f"checkpoints/step_{number:08}"

    def names(self, run=None):
        return sorted(p.name for p in ((run or self.run_dir) / "checkpoints").iterdir())

    def verified(self, checkpoint):
        self.upmoe("inspect", "--verify", checkpoint)

    def tmpfs(self, size):
        return mount_tmpfs(self, self.dir / "disk", size)

    def test_the_last_save_makes_room_rather_than_losing_the_state(self):
        run = self.tmpfs("4m") / "run"
        said = self.train(f"run.dir={run}", "train.steps=40", "checkpoint.keep=9")
        self.assertIn("failed, training goes on", said)  # keep: 9 lets nothing go before the end
        self.assertIn("for the last one of this run", said)
        self.verified(run / "checkpoints/step_00000040")
        # The advice of the failures, followed, ends them.
        keep = re.search(r"set checkpoint.keep=(\d)", said).group(1)
        self.assertNotIn("failed", self.train(f"run.dir={run}", "train.steps=80", f"checkpoint.keep={keep}"))
        self.verified(run / "checkpoints/step_00000080")

    def test_what_is_beyond_keep_goes_before_a_save_that_lacks_room(self):
        run = self.tmpfs("4m") / "run"
        said = self.train(f"run.dir={run}", "train.steps=40", "checkpoint.keep=3")  # room for three, not for four
        self.assertNotIn("failed", said)
        self.assertIn("before the next one is written", said)
        self.assertNotIn("failed", self.train(f"run.dir={run}", "train.steps=50", "checkpoint.keep=2"))
        self.assertEqual(self.names(run), ["step_00000045", "step_00000050"])
        for name in self.names(run):
            self.verified(run / "checkpoints" / name)

    def test_checkpoints_that_cannot_be_read_are_no_reason_to_start_over(self):
        self.train("train.steps=15")
        before = (self.run_dir / "metrics.jsonl").read_bytes()
        paths = [word for n in (5, 10, 15) for word in ("-P", self.step(n) / "shard_00000.h5")]
        said = self.train("train.steps=20", status=3, before=self.fault(*paths, "-e", "inject=pread64:error=EIO"))
        self.assertIn("none can be used", said)
        self.assertIn("Input/output error", said)
        self.assertNotIn("damaged", said)
        self.assertEqual((self.run_dir / "metrics.jsonl").read_bytes(), before)
        self.assertEqual(self.names(), ["step_00000005", "step_00000010", "step_00000015"])
        # One alone is passed over, and stays what it is: the next start may be able to read it. A save of its step
        # sets it aside.
        said = self.train("train.steps=16", before=self.fault(*paths[4:], "-e", "inject=pread64:error=EIO"))
        self.assertIn("step_00000010 (step 10)", said)
        self.assertEqual(self.names(), ["step_00000010", "step_00000015", "step_00000015.aside", "step_00000016"])

    def test_too_many_open_files_are_no_fault_of_a_checkpoint(self):
        self.train("train.steps=10")
        said = self.train("train.steps=20", status=3,
                          before=self.fault("-P", self.step(10) / "manifest.json", "-e",
                                            "inject=openat:error=EMFILE"))
        self.assertIn("ulimit -n", said)
        self.assertEqual(self.names(), ["step_00000005", "step_00000010"])

    def test_another_users_checkpoint_is_passed_over_with_its_reason(self):
        if os.geteuid() == 0 and not shutil.which("setpriv"):
            self.skipTest("no setpriv")
        self.train("train.steps=10")
        before = []
        if os.geteuid() == 0:
            before = ["setpriv", "--reuid", str(NOBODY), "--clear-groups"]
            for path in (self.dir, *self.dir.rglob("*")):
                os.chown(path, NOBODY, -1)
            os.chown(self.step(10), 0, 0)
            if subprocess.run([*before, UPMOE, "--version"], capture_output=True, check=False).returncode:
                self.skipTest("another user may not start the program here")
        self.step(10).chmod(0o700 if os.geteuid() == 0 else 0)
        self.addCleanup(lambda: [p.chmod(0o700) for p in (self.run_dir / "checkpoints").iterdir()])
        said = self.train("train.steps=12", before=before)
        self.assertIn("Permission denied", said)
        self.assertNotIn("damaged", said)
        self.assertIn("step_00000005 (step 5)", said)

    def test_a_complete_checkpoint_is_no_failure_because_its_name_is_not_confirmed(self):
        folder = self.run_dir / "checkpoints"
        folder.mkdir(parents=True)
        said = self.train("train.steps=5", before=self.fault("-P", folder, "-e", "inject=fsync:error=EIO"))
        self.assertIn("is complete, but the disk did not confirm its name", said)
        self.verified(self.step(5))

    def test_a_removal_that_fails_only_warns(self):
        self.train("train.steps=15")
        said = self.train("train.steps=25", before=self.fault("-e", "inject=unlink,unlinkat:error=EIO"))
        self.assertIn("older checkpoints are not removed", said)
        self.verified(self.step(25))

    def test_the_other_name_of_what_is_removed_is_made_durable_first(self):
        # Two saves sync the folder once each, the third twice: for its own name, then for the one that is retired.
        said = self.train("train.steps=15", "checkpoint.keep=2",
                          before=self.fault("-P", self.run_dir / "checkpoints", "-e", "inject=fsync:error=EIO:when=4"))
        self.assertIn("older checkpoints are not removed", said)
        self.assertEqual(len(list((self.run_dir / "checkpoints/step_00000005.old").iterdir())), 3)

    def test_the_metrics_of_its_steps_are_on_the_disk_before_a_checkpoint(self):
        calls = self.dir / "calls"
        traced = self.fault("-y", "-e", "trace=fsync,renameat2")
        traced[traced.index("/dev/null")] = str(calls)
        self.train("train.steps=10", "checkpoint.async=false", before=traced)
        seen = [("save" if "step_" in line else "metrics") for line in calls.read_text().splitlines()
                if "metrics.jsonl>" in line or ("renameat2" in line and ".tmp" in line)]
        self.assertEqual(seen[:4], ["metrics", "save"] * 2)
        said = self.train("train.steps=15", before=self.fault("-P", self.run_dir / "metrics.jsonl", "-e",
                                                              "inject=fsync:error=EIO"))
        self.assertEqual(said.count("a power cut may lose metrics"), 1)
        self.verified(self.step(15))

    def test_what_a_failed_output_could_not_remove_is_cleared_by_the_next(self):
        self.train("train.steps=5")
        words = ("export", self.run_dir, "--to", self.dir / "out")
        self.upmoe(*words, status=3, before=self.fault("-e", "inject=rename,unlinkat:error=EIO"))
        self.assertTrue((self.dir / "out.upmoe-partial").exists())
        self.upmoe(*words)
        self.assertEqual(list(self.dir.glob("out.*")), [])

    def test_a_listing_that_fails_after_the_start_only_warns(self):
        self.train("train.steps=5")
        folder, calls = self.run_dir / "checkpoints", self.dir / "calls"
        traced = self.fault("-P", folder, "-e", "trace=getdents64")
        traced[traced.index("/dev/null")] = str(calls)
        self.train("train.steps=5", before=traced)  # nothing to do: what a start lists
        start = calls.read_text().count("getdents64")
        said = self.train("train.steps=7", before=self.fault("-P", folder, "-e",
                                                             f"inject=getdents64:error=EIO:when={start + 1}+"))
        self.assertIn("older checkpoints are not removed", said)
        self.verified(self.step(7))

    def test_a_slow_disk_is_no_hang_at_a_resume(self):
        self.train("train.steps=5")
        slow = self.fault("-e", "trace=pread64", "-e", "inject=pread64:delay_enter=50000")
        said = self.upmoe("train", "--deadline", "2", self.dir / "run.yaml", "parallel.ep=1", "train.steps=6",
                          before=slow)
        self.assertIn("step_00000006", said.stderr)

    def test_a_slow_disk_is_no_hang_at_a_save(self):
        slow = self.fault("-e", "trace=pwrite64", "-e", "inject=pwrite64:delay_enter=40000")
        began = time.monotonic()
        self.upmoe("train", "--deadline", "2", self.dir / "run.yaml", "parallel.ep=1", "train.steps=3",
                   "checkpoint.every=100", before=slow)
        self.assertGreater(time.monotonic() - began, 4)  # twice the deadline
        self.verified(self.step(3))

    def test_a_run_whose_folder_was_moved_ends_with_words(self):
        first = subprocess.Popen([UPMOE, "train", str(self.dir / "run.yaml"), "parallel.ep=1", "train.steps=1000000",
                                  "checkpoint.every=20"], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.addCleanup(lambda: first.poll() is None and first.kill())
        end = time.monotonic() + 60
        while not list(self.run_dir.glob("checkpoints/step_????????")):
            self.assertLess(time.monotonic(), end)
            time.sleep(0.02)
        moved = self.dir / "run.old"
        self.run_dir.rename(moved)
        self.train("train.steps=10")
        _, said = first.communicate(timeout=60)
        self.assertEqual(first.returncode, 3, said)
        self.assertIn("no longer the folder that this run began in", said)
        self.assertEqual(self.names(), ["step_00000005", "step_00000010"])
        for name in [n for n in self.names(moved) if re.fullmatch(r"step_\d{8}", n)]:
            self.verified(moved / "checkpoints" / name)

    def test_places_that_are_not_meant_for_runs(self):
        (self.dir / "file").write_text("")
        for place in ("/", "", self.dir / "file", self.dir / "model"):
            said = self.train(f"run.dir={place}", status=2)
            self.assertIn("run.dir", said)
        self.assertIn("/proc/nothing", self.train("run.dir=/proc/nothing/run", status=3))
        self.assertEqual(sorted(p.name for p in (self.dir / "model").iterdir()), ["config.json"])

    def test_what_the_system_refuses_is_bad_input(self):
        loop = self.dir / "loop"
        loop.symlink_to("loop")
        for words in (("inspect", loop), ("export", loop, "--to", self.dir / "x"),
                      ("eval", loop, "--data", self.dir / "tokens.h5", "--seq-len", "16")):
            said = self.upmoe(*words, status=3).stderr
            self.assertIn("symbolic links", said)
            self.assertIn(str(loop), said)
        self.train(f"model.path={loop}", "model.init=weights", status=3)

    def test_an_export_holds_the_masters(self):
        self.train("train.steps=5", "train.precision=bf16", "optimizer.lr=3e-3")
        self.check_export(self.dir / "exported")

    def test_routers_in_fp32_are_converted_and_exported(self):
        words = ("train.precision=bf16", "optimizer.lr=3e-3")
        self.train("train.steps=3", *words)
        said = self.train("train.steps=5", *words, "router.dtype=fp32")
        self.assertIn("router.dtype: auto -> fp32 (the routers are converted", said)
        self.assertRegex(said, r"kept in fp32: layers\.\*\.moe\.router_ED")
        self.check_export(self.dir / "exported")
        self.upmoe("export", self.run_dir, "--to", self.dir / "bf16", "--dtype", "bf16")
        there = json.loads(self.upmoe("inspect", self.dir / "bf16", "--json").stdout)["tensors"]
        self.assertEqual({tensor["dtype"] for tensor in there}, {"BF16"})
        stored = json.loads(self.upmoe("inspect", self.run_dir, "--json").stdout)["tensors"]
        fp32 = {tensor["name"] for tensor in stored if (tensor["kind"], tensor["dtype"]) == ("weight", "fp32")}
        self.assertTrue(fp32 and all(name.endswith("moe.router_ED") for name in fp32), fp32)
        self.train("train.steps=7", *words)

    def check_export(self, exported):
        self.upmoe("export", self.run_dir, "--to", exported, "--dtype", "fp32")
        diff = json.loads(self.upmoe("inspect", exported, "--diff", self.run_dir, "--json").stdout)
        self.assertEqual(diff["difference"], [])
        raw = b"".join(data for _, _, data in read_safetensors(exported / "model.safetensors")[0].values())
        words = struct.unpack(f"<{len(raw) // 4}I", raw)
        self.assertGreater(sum(w & 0xFFFF != 0 for w in words), len(words) // 2)


if __name__ == "__main__":
    unittest.main(verbosity=2)
