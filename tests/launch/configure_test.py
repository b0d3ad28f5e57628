"""CMake itself over the project: no test's library is needed for the program, what is missing is named with the package
that brings it, a build without MPI has no test that starts jobs, and CUDA is asked for or left out in words."""

import json
import os
import subprocess
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ABSENT = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in ("GTest", "benchmark", "Boost")]
STARTS_JOBS = ("mpirun", "run_local.sh", "run_hosts.sh")
FALSE_LAUNCHERS = {"restart_test", "slurm_test", "grace_test", "scripts_test", "script_mutations_test", "setup_test",
                   "configure_test"}  # need no MPI of ours


class Configure(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.build = Path(scratch.name) / "build"

    def configure(self, *options, **environment):
        run = subprocess.run(["cmake", "-S", ROOT, "-B", self.build, "-G", "Ninja", *options], text=True, check=False,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | environment)
        return run.returncode, " ".join(run.stdout.split())  # CMake folds its lines

    def test_the_program_needs_nothing_of_the_tests(self):
        status, words = self.configure("-DUPMOE_TESTS=OFF", "-DUPMOE_CUDA=OFF", "-DUPMOE_PYTHON=/nowhere", *ABSENT)
        self.assertEqual(status, 0, words)
        status, words = self.configure("-DUPMOE_TESTS=ON")  # the same folder
        self.assertNotEqual(status, 0)
        self.assertIn("apt-get install libgtest-dev libgmock-dev", words)
        self.assertIn("-DUPMOE_TESTS=OFF", words)
        self.assertIn("./launch/setup.sh", words)

    def test_a_toolkit_that_cannot_be_used_is_said_in_words(self):
        nvcc = self.build.parent / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text("#!/bin/sh\necho \"nvcc fatal: Unsupported gpu architecture 'compute_90a'\" >&2; exit 1\n",
                        encoding="utf-8")
        nvcc.chmod(0o755)
        own = {"CUDA_HOME": str(nvcc.parent.parent)}
        status, words = self.configure("-DUPMOE_TESTS=OFF", **own)
        self.assertEqual(status, 0, words)
        self.assertIn("Unsupported gpu architecture 'compute_90a'); building for the CPU alone", words)
        status, words = self.configure("-DUPMOE_CUDA=ON", **own)
        self.assertNotEqual(status, 0)
        self.assertIn("-DUPMOE_CUDA=AUTO builds for the CPU alone", words)

    def test_a_build_without_mpi_starts_no_jobs(self):
        status, words = self.configure("-DUPMOE_MPI=OFF", "-DUPMOE_CUDA=OFF", "-DUPMOE_SANITIZE=thread")
        self.assertEqual(status, 0, words)
        shown = subprocess.run(["ctest", "--test-dir", self.build, "--show-only=json-v1"], capture_output=True,
                               check=True).stdout
        tests = json.loads(shown)["tests"]
        self.assertGreater(len(tests), 30)
        for test in tests:
            labels = [label for p in test["properties"] if p["name"] == "LABELS" for label in p["value"]]
            self.assertNotIn("mpi", labels)
            if test["name"] in FALSE_LAUNCHERS:
                continue
            for word in test.get("command", []):
                if word.endswith((".py", ".sh")) and word.startswith(str(ROOT / "tests")):
                    text = Path(word).read_text(encoding="utf-8")
                    self.assertFalse(any(name in text for name in STARTS_JOBS), f"{test['name']}: {word}")

    def test_an_unknown_processor(self):
        status, words = self.configure("-DUPMOE_ARCH=x86-64-v5")
        self.assertNotEqual(status, 0)
        self.assertIn("native, x86-64-v3 or x86-64-v4", words)


if __name__ == "__main__":
    unittest.main()
