"""How the Python tools end, and that the quickstart's table and pictures speak of the same sequences."""

import argparse
import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "launch"))
import collect_text  # noqa: E402
import quickstart_table  # noqa: E402
from command_line import BadInput, BadUsage, run_tool  # noqa: E402
from whole_file import whole_file, write_whole  # noqa: E402


def status_and_words(main):
    words = io.StringIO()
    with contextlib.redirect_stderr(words):
        status = run_tool("tool", main)
    return status, words.getvalue()


def throw(error):
    raise error


class WholeFiles(unittest.TestCase):
    def test_a_file_is_the_old_one_until_the_new_one_is_whole(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "done.json"
            write_whole(path, "first")
            with self.assertRaises(BadInput), whole_file(path) as part:
                part.write_text("sec", encoding="utf-8")
                raise BadInput("cut off")
            self.assertEqual(path.read_text(encoding="utf-8"), "first")
            with whole_file(str(path)) as part:
                part.write_text("second", encoding="utf-8")
                self.assertEqual(path.read_text(encoding="utf-8"), "first")
            self.assertEqual(path.read_text(encoding="utf-8"), "second")
            self.assertEqual(list(Path(folder).iterdir()), [path])


class Endings(unittest.TestCase):
    def test_every_error_is_one_line_with_its_status(self):
        for error, status, words in ((BadInput("no good"), 3, "no good"), (KeyError("k"), 1, "unexpected KeyError"),
                                     (BadUsage("not so"), 2, "not so"),
                                     (PermissionError(13, "Permission denied", b"f\xff"), 3, "f\ufffd: Perm"),
                                     (KeyboardInterrupt(), 130, "stopped"), (MemoryError(), 1, "out of memory"),
                                     (ValueError("two\nlines"), 1, "two lines")):
            found, told = status_and_words(lambda error=error: throw(error))
            self.assertEqual(found, status)
            self.assertIn(words, told)
            self.assertEqual(told.strip().count("\n"), 0, told)
        self.assertEqual(status_and_words(lambda: None), (0, ""))

    PROGRAM = "import sys, time; sys.path.append('launch'); from command_line import run_tool; "

    def start(self, body):
        return subprocess.Popen([sys.executable, "-c", self.PROGRAM + body], cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def test_a_closed_pipe_is_no_error(self):
        tool = self.start("sys.exit(run_tool('tool', lambda: [print('x' * 1000) for _ in range(1000)] and 0))")
        tool.stdout.close()
        self.assertEqual((tool.wait(timeout=60), tool.stderr.read()), (0, b""))
        tool.stderr.close()

    def test_ctrl_c_while_libraries_load_ends_without_a_traceback(self):
        tool = self.start("print('loading', flush=True); time.sleep(60)")
        tool.stdout.readline()
        tool.send_signal(signal.SIGINT)
        _, told = tool.communicate(timeout=60)
        self.assertEqual((tool.returncode, told), (-signal.SIGINT, b""))

    def test_a_python_without_the_packages_is_told_what_to_do(self):
        for tool, way_out in (("report.py", "launch/setup.sh"), ("study.py", "launch/setup.sh"),
                              ("routing_picture.py", "launch/setup.sh"), ("write_gguf.py", "launch/after_training.sh"),
                              ("quickstart_table.py", ".venv/bin/python"), ("quickstart_seeds.py", ".venv/bin/python")):
            found = subprocess.run([sys.executable, "-S", ROOT / "launch" / tool], capture_output=True, text=True,
                                   check=False)
            self.assertEqual(found.returncode, 2, found.stderr)
            self.assertRegex(found.stderr, rf"error: .* cannot import \w+; .*{way_out}")
            self.assertEqual(found.stderr.count("\n"), 1, found.stderr)

    def test_what_a_script_of_tests_needs_is_told_behind_its_help(self):
        def started(name, *words):
            return subprocess.run([sys.executable, "-S", ROOT / "tests" / name, *words], capture_output=True, text=True,
                                  check=False)

        for script in sorted((ROOT / "tests").glob("*.py")):
            found = started(script.name, "--help")
            self.assertEqual((found.returncode, found.stdout[:6]), (0, "usage:"), f"{script}: {found.stderr}")
        for name, words in (("adapters_in_peft", ""), ("round_trips", ""), ("check_export_in_transformers", "abc"),
                            ("check_masked_step_in_torch", "a")):
            found = started(f"{name}.py", *words)
            self.assertEqual(found.returncode, 2, found.stderr)
            self.assertRegex(found.stderr, rf"\A{name}: error: .* cannot import \w+; tests/\w+\S+ .*\n\Z")

    def test_a_page_is_not_opened_without_a_browser(self):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "chromedriver").touch(0o700)
            browser = ("--browser", sys.executable)
            for words, path, status, told in (
                    (["/no/page"], folder, 3, "/no/page: not found; give the"),
                    ([__file__], folder, 2, "no browser of chromium, .*: not found; install one"),
                    (["--browser", "/no/such", __file__], folder, 2, "/no/such: not found; install one"),
                    ([*browser, __file__], "/no/such", 2, "chromedriver: not found; install the"),
                    ([*browser, __file__], folder, 2, "cannot import selenium; tests/browser_requirements.txt has")):
                found = subprocess.run([sys.executable, "-S", ROOT / "tests/report_in_browser.py", *words], text=True,
                                       capture_output=True, env={**os.environ, "PATH": path}, check=False)
                self.assertEqual(found.returncode, status, found.stderr)
                self.assertRegex(found.stderr, rf"\Areport_in_browser: error: .*{told}.*\n\Z")

    # `upmoe generate` reads it off a line, and ends with the status that the line has.
    def test_text_without_its_package_is_told_what_to_do(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            path.write_text("{}")
            for packages, status, words in ((["-S"], 2, "cannot import tokenizers; run launch/setup.sh"),
                                            ([], 3, "not a Hugging Face tokenizer.json")):
                found = subprocess.run([sys.executable, *packages, ROOT / "data/text_codec.py", path], input="",
                                       capture_output=True, text=True, check=False)
                told = json.loads(found.stdout)
                self.assertEqual((found.returncode, told["status"]), (status, status), found.stderr)
                self.assertIn(words, told["error"])

    def test_every_tool_ends_this_way(self):
        for folder in ("launch", "data", "tests/bench"):
            for path in sorted((ROOT / folder).glob("*.py")):
                text = path.read_text(encoding="utf-8")
                if "__main__" in text and not path.name.startswith(("check_", "make_golden")):
                    self.assertIn("sys.exit(run_tool(", text, str(path))


    def test_progress_in_a_file_has_a_time_and_on_a_terminal_none(self):
        say = [sys.executable, "-c", "import sys; sys.path.append('launch'); import command_line; "
               "print(command_line.line_time() + 'on', file=sys.stderr)"]
        told = subprocess.run(say, cwd=ROOT, capture_output=True, text=True, check=True).stderr
        self.assertRegex(told, r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d on\n$")
        terminal, screen = os.openpty()
        subprocess.run(say, cwd=ROOT, stderr=screen, check=True)
        os.close(screen)
        self.assertEqual(os.read(terminal, 100), b"on\r\n")
        os.close(terminal)
        for tool in ("launch/study.py", "data/tokenize.py"):
            self.assertIn(f"{{line_time()}}{Path(tool).stem}: ", (ROOT / tool).read_text(encoding="utf-8"))

    def test_an_unknown_option_brings_the_nearest(self):
        for tool, typed, meant in (("data/tokenize.py", "--tokeniser=x", "--tokenizer"),
                                   ("launch/collect_text.py", "--megabyte5", "--megabytes"),
                                   ("launch/collect_text.py", "--xyzzy", "")):
            found = subprocess.run([sys.executable, ROOT / tool, typed], capture_output=True, text=True, check=False)
            self.assertEqual(found.returncode, 2, found.stderr)
            self.assertIn(f"error: unknown option '{typed.split('=')[0]}'; " +
                          (f"did you mean '{meant}'?" if meant else "--help lists everything"), found.stderr)
        for folder in ("launch", "data"):  # of whoever is started by people
            for path in sorted((ROOT / folder).glob("*.py")):
                if not path.name.startswith(("check_", "make_golden")) and path.name != "command_line.py":
                    self.assertNotIn("ArgumentParser(", path.read_text(encoding="utf-8"), str(path))


class CollectText(unittest.TestCase):
    # Otherwise the next stage of the quickstart would stop at it.
    def test_only_what_can_be_tokenized_is_chosen(self):
        with tempfile.TemporaryDirectory() as folder:
            for name, content, good in (("a.py", b"x = 1\n", True), ("b.json", b'{"name": "x"}', False),
                                        ("c.jsonl", b'{"text": "x"}\n', True), ("d.txt", b"\xff", False),
                                        ("e.txt", b"a\0", False), ("f.zip", b"PK\x03\x04", False)):
                path = Path(folder) / name
                path.write_bytes(content)
                self.assertEqual(collect_text.is_text(path), good, name)


class GpuRecord(unittest.TestCase):
    def test_fusions_beside_their_passes(self):
        sys.path.insert(0, str(ROOT / "tests" / "bench"))
        self.addCleanup(sys.path.remove, str(ROOT / "tests" / "bench"))
        import gpu_record
        ops = {"norm/64": {"microseconds": 10.0, "gbytes_per_s": 300}, "rope/64": {"microseconds": 1.0},
               "norm_apart/64": {"microseconds": 15.0, "gbytes_per_s": 400},
               "lost_apart/64": {"microseconds": 15.0, "gbytes_per_s": 400}}
        self.assertEqual(gpu_record.fusions_of({"ops": ops}), {
            "norm/64": {"microseconds": 10.0, "apart_microseconds": 15.0, "times_as_fast": 1.5, "by_bytes": 2.0}})
        self.assertEqual(gpu_record.fusions_of({}), {})


class GenerateAgainstTransformers(unittest.TestCase):
    """What the script makes of times; the times themselves are taken by hand."""

    def setUp(self):
        sys.path.insert(0, str(ROOT / "tests" / "bench"))
        self.addCleanup(sys.path.remove, str(ROOT / "tests" / "bench"))
        import generate_against_transformers
        self.script = generate_against_transformers

    def test_summary(self):
        table = 4 * 32000 * 1024

        def side(prefill, token, weights=3 * table):
            return {"prefill_seconds": prefill, "token_seconds": token, "weight_bytes": weights}
        rounds = [{"read_bytes_per_s": slow * 2.0 * table, "upmoe": side(slow, 4 * slow), "forward_seconds": slow / 4,
                   "transformers": side(3 * slow, 8 * slow)} for slow in (1, 5, 2)]
        # Beside both tables one as large, of which the last layer's queries, output and FFN see one token of 512.
        of_one_token = 1024 * (2 * 1024 + 3 * 2816)
        product_rate = 2 * (512 * 32000 * 1024 - 511 * of_one_token) / 1.5  # so that the products take 1.5 s
        found = self.script.summary(self.script.SHAPE, "fp32", rounds, 512, product_rate)
        self.assertEqual(found["bytes_of_a_token"], 2 * table)
        self.assertEqual(found["upmoe"], {"prefill_seconds": 2, "token_seconds": 8, "bandwidth_share": 1 / 16,
                                          "products_share": 0.75})
        self.assertEqual((found["transformers"]["bandwidth_share"], found["transformers"]["products_share"]),
                         (1 / 32, 0.25))
        self.assertEqual((found["prefill_seconds_ratio"], found["token_seconds_ratio"]), (3, 2))
        self.assertEqual((found["forward_seconds"], found["prefill_of_forward"]), (0.5, 0.25))
        rounds[1]["transformers"]["weight_bytes"] += table
        with self.assertRaisesRegex(SystemExit, "different weights"):
            self.script.summary(self.script.SHAPE, "fp32", rounds, 512, product_rate)

    def test_rates_of_products_are_doctor_s(self):
        with tempfile.TemporaryDirectory() as folder:
            args = argparse.Namespace(binary=Path(folder) / "upmoe", threads=2)
            told = "kind: cpu\nbf16_tflops: 1.25\nfp32_tflops: 5e-1\ngemm_bf16: [0.1]\n"
            for words in (told, told.replace("fp32_t", "t")):
                args.binary.write_text(f"#!/bin/sh\necho \"$@\" $OMP_NUM_THREADS >{folder}/asked\necho '{words}'\n")
                args.binary.chmod(0o755)
                if words == told:
                    self.assertEqual(self.script.product_rates(args), {"fp32": 5e11, "bf16": 1.25e12})
                    self.assertEqual((Path(folder) / "asked").read_text(), "doctor --measure --device cpu 2\n")
                else:
                    with self.assertRaisesRegex(SystemExit, "tells no rates of products"):
                        self.script.product_rates(args)

    def test_a_plain_read(self):
        self.assertGreater(self.script.read_bandwidth(2, size=1 << 22, repeats=2), 1e6)


class QuickstartTable(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
        for model in ("dense", "dense_continued", "moe", "moe_trained"):
            (self.folder / "models" / model).mkdir(parents=True)
            (self.folder / "models" / model / "config.json").write_text("{}")
            (self.folder / "models" / model / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        (self.folder / "eval").mkdir()
        for name in ("dense", "dense_continued", "moe_step0", "moe", "moe_exported"):
            self.evaluated(name, 4.0 if name.startswith("moe") else 4.5, 1000)
        for run in ("dense", "dense_continued", "moe"):
            self.run_ended(run, 4.0 if run == "moe" else 4.5, 1000)

    def evaluated(self, name, loss, tokens):
        (self.folder / "eval" / f"{name}.json").write_text(json.dumps({"loss": loss, "tokens": tokens}))

    def run_ended(self, run, loss, tokens, least=0.02):
        """Four steps, a held-out loss that falls by 0.1 a step; the mixture's steps cost twice the FLOPs. `least`: the
        load of one of its four experts."""
        (self.folder / run).mkdir(exist_ok=True)
        load = {"expert_load": [[least, 0.5 - least, 0.25, 0.25]]} if run == "moe" else {}
        lines = []
        for step in (1, 2, 3, 4):
            lines += [{"step": step, "tokens": 10 * step, "tokens_per_s": 5.0, "seconds": 2.0, "loss": loss, "ranks": 2,
                       "flops": 50.0 if run == "moe" else 25.0} | load,
                      {"kind": "eval", "step": step, "tokens": 10 * step, "eval_loss": loss + 0.1 * (4 - step),
                       "eval_tokens": tokens}]
        (self.folder / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def status(self, *options):
        arguments = ["quickstart_table.py", str(self.folder), "--check", *options]
        with contextlib.redirect_stdout(io.StringIO()), unittest.mock.patch.object(sys, "argv", arguments):
            return quickstart_table.main()

    def test_one_set_of_sequences_one_number(self):
        self.assertEqual(self.status(), 0)
        self.run_ended("dense", 4.5, 250)
        with self.assertRaisesRegex(BadInput, "250 tokens, the table's over 1000"):
            self.status()
        self.run_ended("dense", 3.96, 1000)
        with self.assertRaisesRegex(BadInput, "3.96"):
            self.status()
        self.run_ended("dense", 4.5, 1000)
        self.evaluated("moe_step0", 4.0, 500)
        with self.assertRaisesRegex(BadInput, "different numbers of tokens"):
            self.status()

    def test_equal_flops_and_dead_experts(self):
        self.assertEqual(self.status(), 0)
        found = json.loads((self.folder / "result.json").read_text())
        self.assertAlmostEqual(found["difference_at_equal_tokens"], 4.0 - 4.5)
        # 4 dense steps of 2 x 25 FLOPs are 2 of the mixture's: its loss is 0.2 above that at its end.
        self.assertAlmostEqual(found["difference_at_equal_flops"], 4.2 - 4.5)
        self.assertAlmostEqual(found["least_expert_load"], 0.08)  # of a quarter
        self.assertEqual(found["unused_experts"], 0)
        self.run_ended("moe", 4.0, 1000, least=0.01)
        self.assertEqual(self.status(), 1)  # better, and an expert has died
        self.assertEqual(json.loads((self.folder / "result.json").read_text())["unused_experts"], 1)
        (self.folder / "moe/metrics.jsonl").write_bytes((self.folder / "dense/metrics.jsonl").read_bytes())
        self.evaluated("moe", 4.5, 1000)
        with self.assertRaisesRegex(BadInput, "moe: its metrics carry no expert_load"):
            self.status()

    def test_seeds_together(self):
        folders = []
        for seed, difference in enumerate((-0.05, -0.06, -0.07), 1):
            folder = self.folder / f"seed{seed}"
            folder.mkdir()
            (folder / "settings").write_text(f"text= steps 4 seed {seed}\n")
            (folder / "result.json").write_text(json.dumps(
                {"difference_at_equal_tokens": difference, "difference_at_equal_flops": 0.01, "unused_experts": 0}))
            folders.append(str(folder))

        def said(*arguments):
            return subprocess.run([sys.executable, ROOT / "launch/quickstart_seeds.py", *arguments], check=False,
                                  capture_output=True, text=True)
        # t of two degrees of freedom, 4.3027, times 0.01 / sqrt(3)
        self.assertIn("for as many tokens: -0.0600 nats per token, 95 % interval -0.0848 to -0.0352 (3 seeds)",
                      said(*folders).stdout)
        self.assertEqual(said(folders[0], folders[0]).returncode, 2)
        (self.folder / "seed2/settings").write_text("text= steps 4 seed 1\n")
        self.assertIn("of the seeds 1, 1, 3;", said(*folders).stderr)
        (self.folder / "seed2/settings").write_text("text= steps 5 seed 2\n")
        self.assertIn("differ in more than their seed", said(*folders).stderr)
        (self.folder / "seed3/result.json").unlink()
        self.assertEqual(said(folders[0], folders[2]).returncode, 3)

    def test_a_brief_run_is_judged_by_its_stages_alone(self):
        self.evaluated("moe", 9.0, 1000)
        self.evaluated("moe_exported", 9.0, 1000)
        self.run_ended("moe", 9.0, 1000)
        self.assertEqual(self.status(), 1)  # the mixture is worse
        self.assertEqual(self.status("--brief"), 1)  # no pictures
        (self.folder / "report").mkdir()
        (self.folder / "report/report.html").write_text("")
        self.assertEqual(self.status("--brief"), 0)
        self.evaluated("moe_exported", 8.9, 1000)
        self.assertEqual(self.status("--brief"), 1)  # the export is another model


if __name__ == "__main__":
    unittest.main()
