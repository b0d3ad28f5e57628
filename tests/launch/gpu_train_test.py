#!/usr/bin/env python3
"""`upmoe train` on a (pretended) GPU, end to end: beside the CPU, twice, resumed, with bad data.

Needs UPMOE_ON_GPU (the program on pretended GPUs), UPMOE (the program itself) and MAKE_RUN in the environment.
"""

import json
import os
import shutil
import struct
import subprocess
import tempfile
import unittest
from pathlib import Path

PRETENDED, UPMOE, MAKE_RUN = (os.environ[name] for name in ("UPMOE_ON_GPU", "UPMOE", "MAKE_RUN"))
STEPS = 4


class GpuTrain(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dir = Path(tempfile.mkdtemp(prefix="upmoe-gpu-"))
        subprocess.run([MAKE_RUN, str(cls.dir)], check=True)
        cls.first = cls.losses("first", "device=cuda")

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.dir, ignore_errors=True)

    @classmethod
    def train(cls, folder, *overrides, program=PRETENDED, **environment):
        return subprocess.run(
            [program, "train", str(cls.dir / "run.yaml"), f"run.dir={cls.dir / folder}", "parallel.ep=1",
             f"train.steps={STEPS}", "checkpoint.every=2", *overrides], check=False, capture_output=True, text=True,
            timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1", "UPMOE_FAKE_DELAYS": "1"} | environment)

    @classmethod
    def losses(cls, folder, *overrides):
        done = cls.train(folder, *overrides)
        if done.returncode != 0:
            raise AssertionError(f"status {done.returncode}:\n{done.stderr}")
        lines = (cls.dir / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [record for record in map(json.loads, lines) if "kind" not in record]
        return [(record["step"], record["loss"], record["grad_norm"]) for record in steps]

    def test_beside_the_cpu(self):
        for (step, mine, norm), (_, theirs, cpu_norm) in zip(self.first, self.losses("cpu", "device=cpu"),
                                                             strict=True):
            self.assertAlmostEqual(mine / theirs, 1, delta=1e-5, msg=f"loss of step {step}")
            self.assertAlmostEqual(norm / cpu_norm, 1, delta=1e-4, msg=f"gradient norm of step {step}")

    def test_auto_takes_the_gpu_and_repeats_itself(self):
        self.assertEqual(self.losses("second", "device=auto"), self.first)

    def test_state_in_the_hosts_memory(self):
        self.assertEqual(self.losses("offloaded", "device=cuda", "optimizer.offload=true"), self.first)

    def test_resumed_in_the_middle(self):
        self.losses("cut", "device=cuda")
        shutil.rmtree(self.dir / "cut" / "checkpoints" / f"step_{STEPS:08}")
        self.assertEqual(self.losses("cut", "device=cuda"), self.first)

    def test_bf16_with_coded_moments_goes_on_from_its_checkpoint(self):
        small = ("device=cuda", "train.precision=bf16", "parallel.reduce=bf16", "optimizer.name=adamw8bit")
        whole = self.losses("coded", *small)
        shutil.rmtree(self.dir / "coded" / "checkpoints" / f"step_{STEPS:08}")
        self.assertEqual(self.losses("coded", *small), whole)
        self.assertLess(abs(whole[-1][1] / self.first[-1][1] - 1), 0.01)

    def test_a_token_out_of_range_is_told_as_on_the_cpu(self):
        done = self.train("poisoned", "device=cuda", "data.shuffle=false",
                          f"data.train=[{{path: {self.dir}/poisoned.h5, weight: 1.0}}]")
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertIn("poisoned.h5", done.stderr)

    def test_it_says_what_it_computes_on(self):
        done = self.train("said", "device=cuda", "train.steps=1")
        self.assertIn("computing on 1 GPU: pretended GPU, compute capability 9.0", done.stderr)

    def test_attention_takes_the_fast_way_documents_masked_or_not(self):
        bf16 = ("device=cuda", "train.precision=bf16", "train.steps=2")
        for name, masked in (("whole", "false"), ("masked", "true")):
            done = self.train(name, *bf16, f"data.mask_documents={masked}")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertNotIn("portable kernel", done.stderr)

    def test_memory_for_work_leaves_the_losses(self):
        for recompute in ("routed_up", "block"):  # all of them: layout_equivalence_test, on the CPU
            self.assertEqual(self.losses(recompute, "device=cuda", f"train.recompute={recompute}"), self.first)

    def test_eval_and_its_logits(self):
        """Of the first run's checkpoint, on both devices."""
        found = {}
        for device in ("cpu", "cuda"):
            done = subprocess.run([PRETENDED, "eval", str(self.dir / "first"), "--data", str(self.dir / "tokens.h5"),
                                   "--seq-len", "32", "--sequences", "4", "--device", device, "--logits",
                                   str(self.dir / f"{device}.safetensors")], check=False, capture_output=True,
                                  text=True, timeout=250)
            self.assertEqual(done.returncode, 0, done.stderr)
            found[device] = json.loads(done.stdout)
        self.assertAlmostEqual(found["cuda"]["loss"] / found["cpu"]["loss"], 1, delta=1e-5)
        cpu, cuda = ((self.dir / f"{device}.safetensors").read_bytes() for device in ("cpu", "cuda"))
        self.assertEqual(len(cpu), len(cuda))
        at = len(cpu) - 4 * 32 * 64 * 4  # the numbers follow the header
        a, b = (struct.unpack(f"<{4 * 32 * 64}f", data[at:]) for data in (cpu, cuda))
        self.assertLess(max(abs(x - y) for x, y in zip(a, b, strict=True)), 1e-4)

    def test_the_program_itself_says_why_it_has_no_gpu(self):
        if shutil.which("nvidia-smi"):
            self.skipTest("there may be one")
        done = self.train("none", "device=cuda", program=UPMOE)
        self.assertEqual(done.returncode, 71, done.stderr)
        self.assertIn("use device: cpu", done.stderr.replace("set device: cpu", "use device: cpu"))


if __name__ == "__main__":
    unittest.main()
