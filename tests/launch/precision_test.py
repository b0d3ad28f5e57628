#!/usr/bin/env python3
"""bf16 on processors whose instructions it lacks: it trains and evaluates, and a line says that it is slower.

ONEDNN_MAX_CPU_ISA hides instructions from the library that computes dense products.
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
from tiny_run import strace, why_no_strace  # noqa: E402

UPMOE, MAKE_RUN = os.environ["UPMOE"], os.environ["MAKE_RUN"]
ROUNDING = 2 ** -9  # of a bf16: a mean over many tokens stays within what rounding the mean itself would do
SLOWER = "bf16 is slower than fp32 on this processor"


class Precision(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.path = Path(cls.folder.name)
        subprocess.run([MAKE_RUN, cls.folder.name], check=True)

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def upmoe(self, isa, *arguments, before=()):
        # A program that is told how to wait does not start itself anew.
        environment = dict(os.environ, ONEDNN_MAX_CPU_ISA=isa, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
        command = [*before, UPMOE, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def train(self, isa, precision, before=()):
        run = self.path / f"{isa}_{precision}_{len(before)}"
        done = self.upmoe(isa, "train", self.path / "run.yaml", "parallel.ep=1", "train.steps=2", "checkpoint.every=2",
                          f"train.precision={precision}", f"run.dir={run}", before=before)
        losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        return run, losses, done.stderr

    def test_bf16_trains_and_evaluates_whatever_the_library_can(self):
        _, exact, text = self.train("SSE41", "fp32")
        self.assertNotIn(SLOWER, text)
        for isa in ("SSE41", "AVX2"):
            run, losses, _ = self.train(isa, "bf16")
            self.assertEqual(len(losses), 2)
            for found, expected in zip(losses, exact):
                self.assertAlmostEqual(found, expected, delta=expected * ROUNDING)
            fp32, bf16 = (json.loads(self.upmoe(
                isa, "eval", run, "--data", self.path / "tokens.h5", "--seq-len", 32, "--sequences", 4,
                "--precision", precision).stdout)["loss"] for precision in ("fp32", "bf16"))
            self.assertAlmostEqual(bf16, fp32, delta=fp32 * ROUNDING)
            self.assertNotEqual(bf16, fp32)

    # With AVX512_CORE the library widens bf16, and so does whoever stands in where there is no AVX-512 at all.
    def test_a_line_says_where_bf16_is_slower_than_fp32(self):
        run, _, text = self.train("AVX512_CORE", "bf16")
        self.assertEqual(text.count(SLOWER), 1, text)
        arguments = ["eval", run, "--data", self.path / "tokens.h5", "--seq-len", 32, "--sequences", 1]
        self.assertEqual(self.upmoe("AVX512_CORE", *arguments, "--precision", "bf16").stderr.count(SLOWER), 1)
        self.assertNotIn(SLOWER, self.upmoe("AVX512_CORE", *arguments).stderr)

    # Where matrix registers are hidden, pairs of bf16 take twice the time of fp32.
    def test_a_line_says_who_hides_matrix_registers(self):
        has = "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
        _, _, text = self.train("AVX512_CORE_BF16", "bf16")
        self.assertEqual("ONEDNN_MAX_CPU_ISA hides its matrix registers (AMX)" in text, has, text)
        if reason := why_no_strace():
            self.skipTest(reason)
        # Behind the first one, which every program needs: registers are neither told nor given.
        _, _, text = self.train("ALL", "bf16", before=strace("-e", "inject=arch_prctl:error=EPERM:when=2+"))
        self.assertEqual("Linux does not give this process its matrix registers (AMX)" in text, has, text)


if __name__ == "__main__":
    unittest.main(verbosity=2)
