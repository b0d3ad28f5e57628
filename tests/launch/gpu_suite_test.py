"""tests/gpu_suite.sh with programs that are none: what runs, in which order, within what time, and what is left of it.

A borrowed GPU's minutes are few: a program that hangs ends, what a cut-off run has finished is not run again, and what
the checks of the kernels found wrong is left out behind them.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "tests" / "bench"))
import gpu_record  # noqa: E402

NEEDED = ["tests/gpu_suite.sh", "tests/support/gpu_parts.sh", "tests/bench/sm90.sh", "tests/kernels/gpu_op_tests.txt",
          "kernels/core/expert_variant.h", "kernels/cuda/sm90/cross_entropy.cu"]
# Says how it was started, and does as a file of its name asks.
PROGRAM = """#!/bin/bash
name=$(basename "$0")
echo "$name $*" >>"$UPMOE_CALLS"
do=$(cat "$UPMOE_SUITE/$name $*" "$UPMOE_SUITE/$name" 2>/dev/null | head -n 1)
[[ -n $do ]] && eval "$do"
[[ $name != bench_step ]] || for i in 1 2 3; do echo "{\\"step\\": $i, \\"loss\\": 11.$i, \\"tokens_per_s\\": 5}"; done
"""
NVIDIA_SMI = """#!/bin/bash
case "$*" in
  -L) echo "GPU 0: NVIDIA H200 (UUID: none)" ;;
  *memory.used*) exec sleep 60 ;;
  *name,*) echo "NVIDIA H200, 580.0, 143771 MiB" ;;
  *) echo 143771 ;;
esac
"""
PYTHON = """#!/bin/bash
case "$*" in
  *ctypes*) printf 'cuBLASLt 1\\ncuDNN 2\\nNCCL 3\\n' ;;
  *gpu_peers.py*) echo "gpu_peers.py $*" >>"$UPMOE_CALLS" ;;
  *) exec REAL "$@" ;;
esac
"""


class GpuSuite(unittest.TestCase):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.folder = Path(self.temporary.name)
        self.root, self.out, self.suite = self.folder / "tree", self.folder / "out", self.folder / "suite"
        for name in NEEDED:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.ops = (self.root / "tests/kernels/gpu_op_tests.txt").read_text().split()
        tools = self.folder / "tools"
        tools.mkdir()
        real = shutil.which("python3")
        for name, text in (("nvidia-smi", NVIDIA_SMI), ("python3", PYTHON.replace("REAL", real))):
            self.script(tools / name, text)
        self.make_bundle()
        self.environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "UPMOE_SUITE": str(self.suite),
                                         "UPMOE_CALLS": str(self.folder / "calls"), "UPMOE_SUITE_LIMIT": "20"}

    def script(self, path, text):
        path.write_text(text)
        path.chmod(0o755)

    def make_bundle(self):
        stage = self.folder / "stage"
        (stage / "bin").mkdir(parents=True)
        (stage / "lib").mkdir()
        for name in [f"{op}_test" for op in [*self.ops, "golden", "generation", "communicator"]] + [
                "make_run", "bench_gpu", "bench_step", "time_algorithms", "time_variants", "sm90_bench", "upmoe"]:
            self.script(stage / "bin" / name, PROGRAM)
        (stage / "commit").write_text("abc\n")
        (stage / "built_at").write_text(str(self.root) + "\n")
        packed = self.root / "build/gpu_suite/suite.tar.xz"
        packed.parent.mkdir(parents=True)
        with tarfile.open(packed, "w:xz", preset=0) as file:
            file.add(stage, ".")

    def asks(self, call, what):
        """Of programs started so, or of this name."""
        self.suite.mkdir(exist_ok=True)
        (self.suite / call).write_text(what + "\n")

    def run_suite(self, *words, **environment):
        (self.folder / "calls").unlink(missing_ok=True)
        done = subprocess.run([self.root / "tests/gpu_suite.sh", "run", self.out, *words], capture_output=True,
                              text=True, check=False, env=self.environment | environment)
        calls = self.folder / "calls"
        self.calls = calls.read_text().splitlines() if calls.exists() else []
        return done

    def unpacked(self):
        """So that asks() outlive the unpacking of the bundle."""
        self.run_suite("largest")

    def test_parts_run_and_are_packed(self):
        pack = self.folder / "results.tar.gz"
        done = self.run_suite("--pack", pack, "kernels", "ops", "step", "full", "times", "bench", "inference",
                              "variants", "algorithms", UPMOE_SUITE_TOKENS="8192")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertLess(self.calls.index("sm90_bench instructions"), self.calls.index("pointwise_test --gtest_brief=1"))
        self.assertEqual(sum(call.startswith("time_variants") for call in self.calls), 18)
        self.assertEqual(sum("--uncompared" in call for call in self.calls), 12)
        bench = next(call for call in self.calls if call.startswith("bench_gpu"))
        self.assertNotIn("filter", bench)
        self.assertIn("fused_as_streams: status 0", done.stdout)
        with tarfile.open(pack) as file:
            names = file.getnames()
        for name in ("./machine.txt", "./kernels/sm90/checks.right", "./full/finished", "./bench/summary.txt"):
            self.assertIn(name, names)
        # From those results alone, as on another machine: nothing is left to do.
        shutil.rmtree(self.out)
        again = self.run_suite("--from", pack, "kernels", "ops", "bench")
        self.assertEqual((again.returncode, self.calls), (0, []), again.stdout + again.stderr)
        self.assertEqual(again.stdout.count("finished before"), 3)

    def test_what_the_checks_found_wrong_is_left_out(self):
        self.unpacked()
        self.asks("sm90_bench kernels up_pairs", "exit 1")
        self.asks("sm90_bench cross_entropy", "exit 1")
        done = self.run_suite("kernels", "step", "times", "variants", "bench", UPMOE_SUITE_TOKENS="8192")
        self.assertEqual(done.returncode, 1)
        self.assertIn("up: not right", done.stdout)
        self.assertFalse(any("fused" in call and call.startswith("bench_step") for call in self.calls), self.calls)
        self.assertFalse(any("--kernels-cross-entropy" in call for call in self.calls))
        self.assertFalse(any(call.startswith("sm90_bench time") and call.endswith(" up") for call in self.calls))
        self.assertTrue(any(call.startswith("sm90_bench time") and call.endswith(" rows") for call in self.calls))
        self.assertIn("--benchmark_filter=-clusters|fused", next(c for c in self.calls if c.startswith("bench_gpu")))

    # It takes a request to end for one to save, as `upmoe train` does.
    def test_what_hangs_is_ended(self):
        self.unpacked()
        self.asks("loss_test", "trap '' TERM; sleep 30")
        done = self.run_suite("ops", UPMOE_SUITE_LIMIT="1")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"(?m)^loss: status 137, ")
        self.assertRegex(done.stdout, r"(?m)^adamw8bit: status 0,")

    def test_time_that_is_over_and_going_on(self):
        self.unpacked()
        self.asks("bench_step", "sleep 3")
        done = self.run_suite("--seconds", "14", "step", UPMOE_SUITE_TOKENS="8192")
        self.assertEqual(done.returncode, 1)
        self.assertIn("four_layers_adamw: no time left", done.stdout)
        self.assertFalse((self.out / "step/finished").exists())
        first = self.calls
        self.assertLess(len(first), 5)
        self.asks("bench_step", "")
        done = self.run_suite("step", UPMOE_SUITE_TOKENS="8192")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertTrue((self.out / "step/finished").exists())
        self.assertFalse(set(self.calls) & set(first), "a program was run again")

    def test_wrong_words(self):
        for words, said in ((("no_such_part",), "no part 'no_such_part'"), (("--seconds", "soon"), "--seconds 'soon'"),
                            (("--from", self.folder / "none"), "no such file"), (("--pack",), "--pack needs a value"),
                            (("--what", "x"), "run knows no --what")):
            done = self.run_suite(*words)
            self.assertEqual((done.returncode, self.calls), (2, []))
            self.assertIn(said, done.stderr)

    # As Google Benchmark writes it, an object for each result behind the context.
    def test_results_of_a_program_that_was_ended(self):
        whole = json.dumps({"context": {"gemm_tflops": "7"}, "benchmarks": [{"name": n} for n in "abc"]}, indent=2)
        self.assertEqual(len(gpu_record.benchmarks_of(whole)["benchmarks"]), 3)
        cut = gpu_record.benchmarks_of(whole[:whole.index('"c"')])
        self.assertEqual(([b["name"] for b in cut["benchmarks"]], cut["context"]["gemm_tflops"]), (["a", "b"], "7"))
        self.assertEqual(gpu_record.benchmarks_of('{\n  "context": {')["benchmarks"], [])


if __name__ == "__main__":
    unittest.main()
