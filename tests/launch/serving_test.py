#!/usr/bin/env python3
"""launch/after_training.sh with tools that are pretended: what is told, recorded and ended with, whatever becomes of a
step. The tools themselves are tried by hand, by starting the script."""

import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "launch"))
import serving_record  # noqa: E402
import serving_steps  # noqa: E402
from command_line import BadInput, BadUsage  # noqa: E402

TOKENS = [7, 7, 3, 9]

UPMOE = f"""#!/bin/sh
echo '{{"tokens": {TOKENS}, "text": null, "tokens_per_s": 1.0}}'
"""

# Makes environments of itself; one package does not install.
PYTHON = f"""#!/bin/bash
case "$1 $2" in
  "-V "*) echo Python 3.11.2 ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") [[ "$*" != *$BROKEN* ]] || {{ echo "ERROR: no such version"; exit 1; }} ;;
  *) exec {sys.executable} "$@" ;;
esac
"""

GGUF = """
class GGUFWriter:
    def __init__(self, path, architecture):
        self.path, self.names = path, []
    def __getattr__(self, name):
        return lambda *arguments: None
    def add_tensor(self, name, values):
        self.names.append(name)
    def write_tensors_to_file(self):
        open(self.path, "w").write("\\n".join(self.names))
class GGUFReader:
    def __init__(self, path):
        self.tensors = open(path).read().split("\\n")
"""

LLAMA = """
import itertools, os
class Llama:
    def __init__(self, model_path, **options):
        assert open(model_path).read()
    def generate(self, prompt, **options):
        if os.environ.get("DIES"):
            print("ggml says goodbye", flush=True)
            os._exit(9)
        return itertools.chain(map(int, os.environ["ANSWER"].split(",")), itertools.repeat(0))
"""


class Record(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.out = Path(temporary.name)

    def results(self, *steps):
        return [serving_record.result_of(self.out, step) for step in steps]

    def test_the_status_names_the_worst(self):
        for step, status in (("a", "done"), ("b", "not_run"), ("c", "not_taken"), ("d", "differs"), ("e", "failed")):
            serving_record.note(self.out, step, status, "words\nof it", {"tool": "1"})
        for steps, status in (("a", 0), ("ab", 69), ("ac", 69), ("abd", 1), ("ae", 1), ("x", 69)):
            self.assertEqual(serving_record.status_of(self.results(*steps)), status, steps)
        self.assertEqual(self.results("d")[0]["words"], "words of it")
        with self.assertRaises(BadUsage):
            serving_record.note(self.out, "f", "fine", "")
        (self.out / "results" / "a.json").write_text('{"step": "a"}')
        with self.assertRaises(BadInput):
            self.results("a")

    def test_the_table_stands_between_its_markers(self):
        document = self.out / "serving.md"
        frame = f"before\n{serving_record.BEGIN}\nold\n{serving_record.END}\nafter\n"
        document.write_text(frame, encoding="utf-8")
        serving_record.note(self.out, "a", "not_taken", "a | b", {"tool": "1.2"})
        serving_record.note(self.out, "b", "done", "fine")
        for day in ("2026-01-01", "2026-01-02"):  # the second replaces the first
            serving_record.write(document, "one", self.results("a"), day)
        serving_record.write(document, "two", self.results("a"), "2026-01-03")
        serving_record.write(document, "one", self.results("b"), "2026-01-04")  # beside its own
        text = document.read_text(encoding="utf-8")
        self.assertTrue(text.startswith("before\n") and text.endswith(f"\n{serving_record.END}\nafter\n"), text)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        self.assertEqual(rows[:2], list(serving_record.HEAD))
        self.assertEqual([row.rpartition(", ")[0] for row in rows[2:]], [
            "| one | a | not taken | a \\| b | tool 1.2 | 2026-01-02", "| one | b | done | fine | - | 2026-01-04",
            "| two | a | not taken | a \\| b | tool 1.2 | 2026-01-03"])
        self.assertNotIn("old", text)
        document.write_text("no markers", encoding="utf-8")
        with self.assertRaises(BadInput):
            serving_record.write(document, "one", self.results("a"))
        with self.assertRaises(BadInput):
            serving_record.family_of(self.out)

    def test_the_document_has_the_markers_and_every_step(self):
        text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
        self.assertLess(text.index(serving_record.BEGIN), text.index(serving_record.END))
        script = (ROOT / "launch" / "after_training.sh").read_text(encoding="utf-8")
        steps = re.search(r"ALL_STEPS=\((.*)\)", script)[1].split()
        self.assertEqual(steps, list(serving_steps.STEPS))
        for step in steps:
            self.assertIn(f"| `{step}` |", text)

    def test_every_package_has_a_version(self):
        script = (ROOT / "launch" / "after_training.sh").read_text(encoding="utf-8")
        pins = "".join((ROOT / "launch" / name).read_text(encoding="utf-8")
                       for name in ("serving_requirements.txt", "serving_requirements_gpu.txt"))
        pinned = set(re.findall(r"(?m)^([\w-]+)==[\d.]+$", pins))
        wanted = set(" ".join(re.findall(r'\[\w+\]="([^"]+)"', script)).split())
        self.assertEqual(wanted, pinned)


class Steps(unittest.TestCase):
    def model(self, **config):
        model = serving_steps.Model.__new__(serving_steps.Model)
        model.tokens, model.config = TOKENS, config
        return model

    def test_tokens_are_compared_from_the_first_on(self):
        self.assertIn("4 of 4", self.model().compared(iter(TOKENS)))
        self.assertIn("2 of 4", self.model().compared([7, 7, 4, 9], must=False))
        for other in ([7, 7, 4, 9], TOKENS[:3], [*TOKENS, 1], []):
            with self.assertRaises(serving_steps.Differs):
                self.model().compared(other)

    def test_groups_divide_every_width(self):
        shape = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 100}
        mixture = {**shape, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 192}
        self.assertEqual(serving_steps.group_size_for({**shape, "intermediate_size": 384}), 128)
        self.assertEqual(serving_steps.group_size_for(mixture), 32)
        self.assertEqual(serving_steps.group_size_for({**mixture, "moe_intermediate_size": 64}), 64)
        self.assertEqual(serving_steps.group_size_for({**mixture, "moe_intermediate_size": 176}), 16)
        for key, value in (("first_k_dense_replace", 1), ("mlp_only_layers", [0])):  # of width 100
            with self.assertRaises(serving_steps.NotTaken):
                serving_steps.group_size_for({**mixture, key: value})
        with self.assertRaises(serving_steps.NotTaken):
            serving_steps.group_size_for(shape)

    def test_experts_of_odd_widths_are_taken_one_by_one(self):
        for config, choice in (({}, {}), ({"moe_intermediate_size": 176}, {}),
                               ({"moe_intermediate_size": 86}, {"experts_implementation": "eager"})):
            self.assertEqual(serving_steps.experts_choice(config), choice)

    def test_what_a_tool_throws_is_its_result(self):
        def throwing(error):
            def work(_):
                raise error
            return serving_steps.outcome(work, None)

        self.assertEqual(throwing(serving_steps.NotTaken("w")), ("not_taken", "w"))
        self.assertEqual(throwing(serving_steps.NotRun("w")), ("not_run", "w"))
        self.assertEqual(throwing(serving_steps.Differs("w")), ("differs", "w"))
        self.assertEqual(throwing(ModuleNotFoundError("w"))[0], "not_run")
        self.assertEqual(throwing(KeyError("w")), ("failed", "KeyError: 'w'"))
        self.assertEqual(serving_steps.outcome(lambda _: "fine", None), ("done", "fine"))

    def test_the_task_is_whole(self):
        folder = ROOT / "configs" / "serving"
        with open(folder / "continuations.jsonl", encoding="utf-8") as file:
            questions = [json.loads(line) for line in file]
        self.assertEqual(len(questions), 12)
        for question in questions:
            self.assertEqual(set(question), {"text", "choices", "answer"})
            self.assertEqual(len(set(question["choices"])), 4)
            self.assertIn(question["answer"], range(4))
        task = (folder / f"{serving_steps.TASK}.yaml").read_text(encoding="utf-8")
        self.assertIn(f"task: {serving_steps.TASK}\n", task)
        self.assertIn("test: configs/serving/continuations.jsonl\n", task)


class Script(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.project = Path(temporary.name) / "project"
        for name in ("after_training.sh", "serving_record.py", "serving_steps.py", "write_gguf.py", "gguf_families.py",
                     "command_line.py", "whole_file.py", "serving_requirements.txt", "serving_requirements_gpu.txt"):
            self.copy(f"launch/{name}")
        self.copy("docs/serving.md")
        self.export = Path(temporary.name) / "export"
        self.export.mkdir()
        shutil.copy(ROOT / "tests/golden/moe_odd/config.json", self.export)
        shutil.copy(ROOT / "tests/golden/moe_odd.safetensors", self.export / "model.safetensors")
        self.tools = Path(temporary.name) / "tools"
        for name, text in (("upmoe", UPMOE), ("python", PYTHON), ("gguf.py", GGUF), ("llama_cpp.py", LLAMA)):
            self.tools.mkdir(exist_ok=True)
            (self.tools / name).write_text(text, encoding="utf-8")
            (self.tools / name).chmod((self.tools / name).stat().st_mode | stat.S_IXUSR)

    def copy(self, name):
        (self.project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, self.project / name)

    def run_script(self, *arguments, **environment):
        env = os.environ | {"UPMOE": str(self.tools / "upmoe"), "PYTHONPATH": str(self.tools), "BROKEN": "no_package",
                            "UPMOE_SERVING_PYTHON": str(self.tools / "python"),
                            "ANSWER": ",".join(map(str, TOKENS))} | environment
        return subprocess.run([str(self.project / "launch" / "after_training.sh"), str(self.export), *arguments],
                              text=True, capture_output=True, env=env, timeout=120, check=False)

    def result(self, step):
        return serving_record.result_of(self.project / "runs/after_training/export", step)

    GGUF_AND_LLAMA = ("--only", "gguf", "--only", "llama")

    def test_all_is_done_and_recorded(self):
        done = self.run_script(*self.GGUF_AND_LLAMA, "--record")
        self.assertEqual(done.returncode, 0, done.stderr + done.stdout)
        self.assertIn("every step is done", done.stderr)
        self.assertIn("37 tensors in F32", self.result("gguf")["words"])
        self.assertIn("4 of 4 greedy tokens", self.result("llama")["words"])
        text = (self.project / "docs" / "serving.md").read_text(encoding="utf-8")
        self.assertIn("| qwen2_moe | llama | done | 4 of 4 greedy tokens as upmoe's; no vocabulary | "
                      f"llama-cpp-python not installed, Python {platform.python_version()} | ", text)
        self.assertNotIn("Not run yet", text)

    def test_other_tokens_end_with_1(self):
        done = self.run_script(*self.GGUF_AND_LLAMA, ANSWER="7,7,4")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("not done: llama", done.stderr)
        self.assertIn("2 of 4 greedy tokens", self.result("llama")["words"])

    def test_a_package_that_does_not_install_costs_its_step_alone(self):
        done = self.run_script(*self.GGUF_AND_LLAMA, BROKEN="llama-cpp-python")
        self.assertEqual(done.returncode, 69, done.stderr)
        self.assertEqual(self.result("gguf")["status"], "done")
        self.assertEqual(self.result("llama")["status"], "not_run")
        self.assertIn("ERROR: no such version", self.result("llama")["words"])

    def test_a_tool_that_ends_the_process_has_failed(self):
        done = self.run_script(*self.GGUF_AND_LLAMA, DIES="1")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("ended with status 9: ggml says goodbye", self.result("llama")["words"])

    def test_a_model_that_is_not_taken(self):
        config = json.loads((self.export / "config.json").read_text(encoding="utf-8")) | {"norm_topk_prob": True}
        (self.export / "config.json").write_text(json.dumps(config), encoding="utf-8")
        done = self.run_script(*self.GGUF_AND_LLAMA)
        self.assertEqual(done.returncode, 69, done.stderr)
        self.assertEqual(self.result("gguf")["status"], "not_taken")
        self.assertIn("norm_topk_prob", self.result("gguf")["words"])
        self.assertIn("step gguf comes first", self.result("llama")["words"])

    def test_without_a_python_every_step_is_named(self):
        done = self.run_script(UPMOE_SERVING_PYTHON="/bin/false", PATH=f"{self.tools}:/usr/bin:/bin")
        self.assertEqual(done.returncode, 69, done.stderr)
        self.assertIn("not done: transformers, quantise, gguf, llama, lm_eval, vllm", done.stderr)
        self.assertIn("/bin/false is no Python", self.result("gguf")["words"])


if __name__ == "__main__":
    unittest.main()
