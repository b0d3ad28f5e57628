"""launch/study.py from end to end with a pretended program: plan, runs, resumption, refusals; nothing is trained."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "launch"))
import study_chain  # noqa: E402
import study_check  # noqa: E402
import study_file  # noqa: E402
import study_provenance  # noqa: E402
from study_test import MATES, STUDY, TAUGHT  # noqa: E402
from study_work import StageFailed  # noqa: E402


class Refusals(unittest.TestCase):
    # The files that a check makes are no help to a user.
    def test_words_of_a_refusal(self):
        file = Path("/tmp/x/0a1b.yaml")
        for said, words in (
                (["warning: error: nothing", f"upmoe: error: {file}: this run is not possible:", "  router.kind: no",
                  "possible meshes of 1 ranks, the nearest first:", "  tp 1"],
                 "this run is not possible: router.kind: no; possible meshes of 1 ranks, the nearest first: tp 1"),
                ([f"upmoe: error: {file}: 2 problems", f"  {file}:3:4: unknown key 'a'", f"  {file}:5:4: b"],
                 "unknown key 'a'; b"),
                (["upmoe: error: /tmp/x/77-shape.json: vocab_size 3"], "its model: vocab_size 3"),
                ([], "upmoe plan: no words"), (["Segmentation fault"], "Segmentation fault")):
            self.assertEqual(study_check.words_of(StageFailed("upmoe plan: no words", 2, said), file), words)


class Study(unittest.TestCase):
    """A study of its own in a folder, with tokens."""

    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.folder = Path(self.temporary.name)
        self.file, self.log = self.folder / "own.yaml", self.folder / "log.txt"
        self.write(STUDY)
        self.make_tokens("out")
        # The pretended program, with the Python that has its packages: not every python3 of a PATH has.
        self.upmoe = self.folder / "upmoe"
        program = ROOT / "tests/support/pretended_upmoe.py"
        self.upmoe.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{program}' \"$@\"\n", encoding="utf-8")
        self.upmoe.chmod(0o755)

    def write(self, text, rates="[2.0e-4, 2.0e-3]"):
        self.file.write_text(text.replace("[2.0e-4, 2.0e-3]", rates), encoding="utf-8")

    def make_tokens(self, out):
        """As tokenize.py left them, so that the study finds them made."""
        study = study_file.read_study(self.file, "micro")
        tokens = self.folder / out / "tokens"
        tokens.mkdir(parents=True)
        (tokens / "tokenizer.json").write_text("{}")
        for part in ("train", "valid"):
            with h5py.File(tokens / f"text_{part}.h5", "w") as file:
                file["tokens"] = np.zeros(100000, dtype=np.uint32)
                file.attrs["vocab_size"], file.attrs["eos_id"] = 2048, 2047
        (tokens / "made.json").write_text(json.dumps({"folders": study.texts} | study.figures["text"], sort_keys=True))

    def study(self, *arguments, out="out", **environment):
        return subprocess.run(
            [sys.executable, ROOT / "launch/study.py", self.file, "--out", self.folder / out, "--upmoe",
             self.upmoe, *map(str, arguments)], capture_output=True, text=True,
            check=False, env=os.environ | {"PRETENDED_LOG": str(self.log)} | environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))

    def done(self, *arguments, **options):
        result = self.study(*arguments, **options)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result

    def commands(self, word):
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith(word)]

    def result(self, out="out"):
        return json.loads((self.folder / out / "result.json").read_text(encoding="utf-8"))


class Whole(Study):
    def test_a_study_from_end_to_end(self):
        self.write(STUDY + "fit: true\n")
        found = self.done()
        result = self.result()
        self.assertEqual(result["verdict"], "supported")
        self.assertIn("'kept' ends below 're-drawn' by 0.001 nats at equal tokens: supported", found.stdout)
        self.assertAlmostEqual(result["comparisons"][0]["mean"], -0.01, delta=0.003)
        for arm in result["arms"].values():
            self.assertEqual(arm["rate"], 2e-3)
            self.assertEqual([seed["seed"] for seed in arm["seeds"]], [1, 2, 3])
        one = result["arms"]["kept"]["seeds"][0]
        self.assertAlmostEqual(one["flops_with_source"] / one["flops"], 3.0)  # 20 steps, and 40 of the source
        self.assertIn("left:", found.stderr)
        table = (self.folder / "out/table.md").read_text(encoding="utf-8")
        self.assertIn("| kept | 0.002 (edge of the grid) |", table)
        self.assertNotIn("seconds", table)
        self.assertIn("interval of the mean over seeds, mean +- t s / sqrt(n)", table)
        self.assertIn("seconds", (self.folder / "out/timings.md").read_text(encoding="utf-8"))
        self.assertTrue((self.folder / "out/curves.png").read_bytes().startswith(b"\x89PNG"))
        # Nothing heavy stays: neither checkpoints nor mixtures.
        self.assertFalse(list(self.folder.glob("out/stages/*/run/checkpoints")))
        made = json.loads((self.folder / "out/provenance.json").read_text(encoding="utf-8"))
        self.assertIn(f"upmoe study {self.file} --out", made["command"])
        self.assertEqual(made["file"], str(self.file.resolve()))
        self.assertEqual(study_provenance.place_of(ROOT / "configs/studies/../studies/leak.yaml"),
                         "configs/studies/leak.yaml")
        self.assertEqual(made["file_sha256"], hashlib.sha256(self.file.read_bytes()).hexdigest())
        self.assertEqual(len(made["runs"]), 3 * (2 + 3))  # two rates and three seeds of each arm
        self.assertEqual(sum(stage["kind"] == "upcycle" for stage in made["stages"]), 2 * 4)
        steps = 4 * 40 + 3 * (2 * 20 + 3 * 20)  # of four sources, and of the arms
        self.assertAlmostEqual(made["flops"], one["flops"] / 20 * steps)
        self.assertTrue(made["wall_s"] > 0 and made["packages"]["numpy"] and made["concluded"])
        self.assertEqual(made["programs"], [{"version": "pretended"}])
        laws = self.commands("cost --fit")
        self.assertEqual(len(laws), 3)  # of each seed, over the two arms that were upcycled
        self.assertEqual([len(line.split()) for line in laws], [2 + 2 + 1 + 2] * 3)
        self.assertEqual(table.count("    a law\n"), 3)
        before = len(self.commands("")) - 3
        self.done()
        self.assertEqual(len(self.commands("")) - 6, before)  # all else is finished
        # Twice the same study gives the same table.
        self.make_tokens("again")
        self.done(out="again")
        for name in ("table.md", "result.json"):
            self.assertEqual((self.folder / "out" / name).read_bytes(), (self.folder / "again" / name).read_bytes())
        self.more_seeds()

    def more_seeds(self):
        before = len(self.commands("train"))
        self.done("--seeds", 4)
        self.assertEqual(len(self.commands("train")) - before, 1 + 3)  # the fourth seed's source and arms

    def test_what_is_counted_has_a_verdict_and_no_curve(self):
        self.write(MATES.replace("arms:", "steps: {source: 9}\narms:", 1))
        found = self.done("--seeds", 2)
        self.assertIn("in 'limited' they do: supported", found.stdout)
        self.assertNotIn("curves.png", found.stdout)
        self.assertFalse((self.folder / "out/curves.png").exists())
        seeds = self.result()["arms"]["limited"]["seeds"]
        self.assertEqual([(seed["sequences"], seed["changed"]) for seed in seeds], [(2, 2), (2, 2)])
        self.assertIn("| free | 4 | 0 | 0, 0 | 0 |", (self.folder / "out/table.md").read_text(encoding="utf-8"))
        self.assertFalse((self.folder / "out/timings.md").exists())
        settings = study_file.read_yaml(Path(self.commands("train")[-1].split()[1]))
        self.assertTrue(settings["data"]["train"][0]["loss_mask"])
        # Batches as the size has them.
        micro = study_file.read_yaml(study_file.STUDIES / "sizes" / "micro.yaml")
        self.assertIn(f"_mates_3x{micro['run']['train.global_batch']}x{micro['seq_len']}.h5",
                      settings["data"]["train"][0]["path"])

    # The plan and the curves count the teacher's forward, a third of a step of a model of its size.
    def test_a_teacher_is_the_sources_model_and_its_forward_is_charged(self):
        self.write(TAUGHT + "rates: [2.0e-3]\nsteps: {source: 40, arm: 20}\n")
        found = self.done("--seeds", 1)
        seeds = {arm: result["seeds"][0] for arm, result in self.result()["arms"].items()}
        self.assertAlmostEqual(seeds["taught"]["flops"] / seeds["alone"]["flops"], 4 / 3)
        self.assertEqual(seeds["taught"]["tokens"], seeds["alone"]["tokens"])
        self.assertAlmostEqual(seeds["drawn"]["flops_with_source"] - seeds["drawn"]["flops"],
                               2 * seeds["alone"]["flops"])
        for arm, seed in seeds.items():
            self.assertRegex(found.stdout, rf"(?m)^{arm} .* {seed['flops']:.3g}".replace("+", r"\+"))
        stages = {arm: [self.folder / "out/stages" / stage for stage in seed["stages"]] for arm, seed in seeds.items()}
        taught = study_file.read_yaml(stages["taught"][-1] / "run.yaml")["train"]
        self.assertEqual(taught["teacher"], {"model": str(stages["taught"][0] / "model")})
        self.assertNotIn("teacher", study_file.read_yaml(stages["alone"][-1] / "run.yaml")["train"])

    def test_a_recipe_that_looks_at_tokens_is_given_them(self):
        self.write(STUDY.replace("{experts.reinit: 1.0}", "{experts.method: cluster, calibrate: text}"), "[2.0e-3]")
        self.done("--seeds", 1)
        given = {" ".join(line.split()[-2:]) for line in self.commands("upcycle") if "--calibrate" in line}
        self.assertEqual(given, {f"--calibrate {self.folder}/out/tokens/text_train.h5"})
        made = [line for line in self.commands("upcycle") if "--plan" not in line]
        self.assertEqual(sum("--calibrate" in line for line in made), len(made) // 2)  # of one arm of two
        # Experts that are made by a text are others where that is another one.
        ids = []
        for folder in ("/tmp", "/"):
            self.write(STUDY.replace("{experts.reinit: 1.0}", "{calibrate: prose}") +
                       f"texts: {{code: stdlib, prose: {folder}}}\n")
            build = study_chain.Builder(study_file.read_study(self.file, "micro"))
            kept, made = (build.run(arm, 1, 1e-3) for arm in ("kept", "re-drawn"))
            self.assertEqual((made.stages[1].text, made.last.text, kept.stages[1].text), ("prose", "code", None))
            self.assertIn('2 upcycle.text null -> "prose"', study_chain.differences(kept.story, made.story))
            ids.append(made.stages[1].id)
        self.assertNotEqual(*ids)

    def test_a_planted_arm_comes_out_worse(self):
        found = self.done("--plant", "kept", "--seeds", 2)
        self.assertIn("supported", found.stdout)
        result = self.result()
        self.assertEqual(result["verdict"], "supported")
        self.assertAlmostEqual(result["arms"]["kept, a tenth of the rate"]["rate"], 2e-4)
        self.assertEqual(self.study("--plant", "nobody").returncode, 2)

    def test_a_rate_that_diverges_is_not_chosen(self):
        self.write(STUDY, rates="[2.0e-3, 2.0]")
        self.done("--seeds", 1)
        self.assertEqual({arm["rate"] for arm in self.result()["arms"].values()}, {2e-3})
        # What was compared lies there by arm and seed, for upmoe report.
        names = sorted(path.name for path in (self.folder / "out/runs").iterdir())
        self.assertEqual(names, ["continued-seed1", "kept-seed1", "re-drawn-seed1"])
        self.assertEqual(json.loads((self.folder / "out/runs/kept-seed1/study.json").read_text()),
                         {"arm": "kept", "seed": 1})

    def test_a_plan_trains_nothing_but_a_probe(self):
        found = self.done("--dry")
        self.assertRegex(found.stdout, r"kept +5 +20 ")  # two rates and three seeds
        self.assertIn("FLOP", found.stdout)
        self.assertIn("of disk at a time", found.stdout)
        trained = [yaml_steps(line.split()[1]) for line in self.commands("train")]
        self.assertEqual(set(trained), {study_chain.PROBE_STEPS})
        self.assertFalse((self.folder / "out/result.json").exists())

    def test_arms_that_cannot_run_are_told_before_the_first_step(self):
        self.write(STUDY.replace("experts.reinit: 1.0", "target.num_experts: 77"))
        found = self.study(PRETENDED_REFUSE="77")
        self.assertEqual(found.returncode, 3, found.stderr)
        self.assertIn("arm 're-drawn' cannot run", found.stderr)
        self.assertIn("too many for this machine", found.stderr)
        self.assertNotIn("arm 'kept' cannot", found.stderr)
        self.assertEqual({yaml_steps(line.split()[1]) for line in self.commands("train")}, {study_chain.PROBE_STEPS})

    # Before texts are tokenized, and before there is a folder.
    def test_wrong_keys_are_told_before_anything_is_computed(self):
        planted = [  # in the study, and what is said of it
            ("train: &arm {steps: arm}", "train: &arm {steps: arm, train.stepps: 3}",
             "own.yaml: arms 'kept', 're-drawn': command 3 (train): unknown key 'train.stepps'; did you mean "
             "train.steps?; arm 'continued': command 2 (train): unknown key"),
            ("upcycle: {experts.reinit: 1.0}", "upcycle: {experts.reinit: 1.5}",
             "own.yaml: arm 're-drawn': command 2 (upcycle): experts.reinit: expected 0 to 1; experts.reinit: a "
             "share;"),
            ("continued: [train: *source, train: *arm]",
             "continued: [train: *source, train: {steps: arm, train.mirco_batch: 3}]",
             "own.yaml: arm 'continued': command 2 (train): unknown key 'train.mirco_batch'; did you mean "
             "train.micro_batch?"),
            ("{model: source, steps: source}", "{model: source, steps: source, train.precison: bf16}",
             "own.yaml: every arm: command 1 (train): unknown key 'train.precison'; did you mean train.precision?"),
            ("upcycle: {experts.reinit: 1.0}", "upcycle: {router.method: prompts}",
             "own.yaml: arm 're-drawn': command 2 (upcycle): the recipe asks for tokens: `calibrate` names"),
            ("upcycle: {experts.reinit: 1.0}", "upcycle: {experts.reinit: 1.0, calibrate: text}",
             "own.yaml: arm 're-drawn': command 2 (upcycle): calibrate: the recipe asks for no tokens"),
            ("upcycle: {experts.reinit: 1.0}", "upcycle: {experts.reinit.x: 1.0}",
             "own.yaml: arm 're-drawn': key 'experts.reinit.x': 'reinit' is a value"),
        ]
        for old, new, said in planted:
            self.assertEqual(STUDY.count(old), 1)
            self.write(STUDY.replace(old, new))
            found = self.study(out="fresh")
            self.assertEqual(found.returncode, 2, found.stderr)
            self.assertIn(said, found.stderr)
            self.assertIn("nothing was begun", found.stderr)
            self.assertFalse((self.folder / "fresh").exists())
        self.assertEqual(self.commands("train"), [])

    def test_a_killed_study_goes_on(self):
        self.write(STUDY, rates="[2.0e-3]")
        self.make_tokens("whole")
        self.done("--seeds", 1, out="whole")
        for word in ("upcycle", "eval"):
            out = f"killed_by_{word}"
            self.make_tokens(out)
            self.log.unlink()
            killed = self.study("--seeds", 1, out=out, PRETENDED_KILL=word)
            self.assertEqual(killed.returncode, -signal.SIGKILL, killed.stderr)
            self.done("--seeds", 1, out=out, PRETENDED_KILL=word)
            self.assertEqual((self.folder / out / "table.md").read_bytes(),
                             (self.folder / "whole/table.md").read_bytes())
            trained = [line for line in self.commands("train") if "run.yaml" in line]
            self.assertLessEqual(len(trained) - len(set(trained)), 1)  # what was under way may begin again
        # Killed at the last moment of a stage: what it left is enough.
        for stage in self.result(out)["arms"]["kept"]["seeds"][0]["stages"]:
            (self.folder / out / "stages" / stage / "done.json").unlink()
        before = len(self.commands("train"))
        self.done("--seeds", 1, out=out)
        self.assertEqual(len(self.commands("train")), before)

    def test_an_arm_that_fails_leaves_the_others(self):
        self.write(STUDY, rates="[2.0e-3]")
        found = self.study("--seeds", 2, PRETENDED_FAIL="1.0 2")
        self.assertEqual(found.returncode, 3, found.stderr)
        self.assertIn("arm 're-drawn', seed 2, rate 0.002: failed, the other runs go on: ", found.stderr)
        said = found.stderr.splitlines()[-1]
        self.assertIn("error: arm 're-drawn', seed 2, rate 0.002: upmoe train", said)
        self.assertIn("planted: the disk is full; the logs are in", said)
        self.assertIn("'kept' ends below 're-drawn' by 0.001 nats at equal tokens: not compared: 're-drawn' failed",
                      found.stdout)
        result = self.result()
        self.assertEqual(list(result["arms"]), ["kept", "continued"])
        self.assertEqual([c["verdict"] == "not compared" for c in result["comparisons"]], [True, False, True])
        self.assertEqual((result["verdict"], result["comparisons"][1]["pairs"]), ("not compared", 2))
        before = len(self.commands("train"))
        self.done("--seeds", 2)
        self.assertEqual(len(self.commands("train")) - before, 1)  # that run alone
        self.make_tokens("whole")
        self.done("--seeds", 2, out="whole")
        for name in ("table.md", "result.json"):
            self.assertEqual((self.folder / "out" / name).read_bytes(), (self.folder / "whole" / name).read_bytes())

    def test_an_arm_without_a_rate_is_left_out(self):
        found = self.study("--seeds", 2, PRETENDED_FAIL="1.0 0")
        self.assertEqual(found.returncode, 3, found.stderr)
        self.assertIn("error: arm 're-drawn', seed 0, rate 0.0002: upmoe train", found.stderr.splitlines()[-1])
        self.assertEqual(list(self.result()["arms"]), ["kept", "continued"])
        # Where the source of all fails it is tried once, and nothing is there to be compared.
        self.make_tokens("none")
        before = len(self.commands("train"))
        found = self.study("--seeds", 1, out="none", PRETENDED_FAIL="0.0 0")
        self.assertEqual(found.returncode, 3, found.stderr)
        self.assertEqual(len(self.commands("train")) - before, 4 + 1)  # a source and three arms of the probe
        self.assertFalse((self.folder / "none/result.json").exists())

    def test_a_changed_study_is_told_from_finished_arms(self):
        self.write(STUDY, rates="[2.0e-3]")
        self.done("--seeds", 1)
        before = len(self.commands("train"))
        self.write(STUDY.replace("experts.reinit: 1.0", "experts.reinit: 0.5"), rates="[2.0e-3]")
        changed = self.done("--seeds", 1)
        self.assertIn("arm 're-drawn', which were made otherwise: 2 upcycle.experts.reinit 1.0 -> 0.5", changed.stderr)
        self.assertNotIn("arm 'kept', which", changed.stderr)
        self.assertEqual(len(self.commands("train")) - before, 2)  # of the changed arm alone: its probe and its run
        self.write(STUDY.replace("re-drawn", "other"), rates="[2.0e-3]")
        self.assertIn("an arm 're-drawn', which the study does not have", self.done("--dry", "--seeds", 1).stderr)

    def test_other_texts_are_not_compared_over(self):
        self.write(STUDY + "text: {megabytes: 5}\n")
        found = self.study()
        self.assertEqual(found.returncode, 3)
        self.assertIn("tokens were made of other texts", found.stderr)
        self.write(STUDY + "texts: {text: /nowhere/at/all}\n")
        found = self.study()
        self.assertEqual(found.returncode, 3)
        self.assertIn("text text: /nowhere/at/all is no folder", found.stderr)
        found = self.study("--text", "/nowhere/else")
        self.assertEqual(found.returncode, 3)
        self.assertIn("--text /nowhere/else: no folder", found.stderr)

    def test_too_little_disk_is_told(self):
        script = ("import shutil, sys, collections; sys.path.insert(0, sys.argv.pop(1)); "
                  "shutil.disk_usage = lambda _: collections.namedtuple('U', 'free')(1); "
                  "sys.argv[0] = 'study'; import study; from command_line import run_tool; "
                  "sys.exit(run_tool('upmoe study', study.main))")
        found = subprocess.run(
            [sys.executable, "-c", script, ROOT / "launch", self.file, "--out", self.folder / "out", "--upmoe",
             self.upmoe], capture_output=True, text=True, check=False)
        self.assertEqual(found.returncode, 3, found.stderr)
        self.assertIn("of disk at a time, 0.0 MB are free", found.stderr)

    def test_usage(self):
        for words in ((), ("randomnes",), ("randomness", "--size", "huge"), ("randomness", "--seeds", "0"),
                      ("randomness", "--upmoe", "/nowhere/upmoe")):
            found = subprocess.run([sys.executable, ROOT / "launch/study.py", *words], capture_output=True, text=True,
                                   check=False)
            self.assertEqual(found.returncode, 2, found.stderr)
            self.assertNotIn("Traceback", found.stderr)
        self.assertIn("did you mean 'randomness'", subprocess.run(
            [sys.executable, ROOT / "launch/study.py", "randomnes"], capture_output=True, text=True,
            check=False).stderr)
        listed = subprocess.run([sys.executable, "-X", "importtime", ROOT / "launch/study.py", "--list"],
                                capture_output=True, text=True, check=False)
        for name in study_file.names():
            self.assertRegex(listed.stdout, rf"(?m)^{name} +\d+ arms  ")
        self.assertIn("study_file", listed.stderr)
        self.assertNotIn("matplotlib", listed.stderr)  # takes a second, and draws nothing here

    def test_a_package_that_only_draws_is_asked_for_before_the_first_run(self):
        (self.folder / "no/matplotlib").mkdir(parents=True)
        (self.folder / "no/matplotlib/__init__.py").write_text("raise ImportError('gone', name='matplotlib')\n")
        found = self.study(PYTHONPATH=str(self.folder / "no"))
        self.assertEqual(found.returncode, 2, found.stderr)
        self.assertIn("cannot import matplotlib; run launch/setup.sh", found.stderr)
        self.assertEqual(self.commands(""), [])


def yaml_steps(path):
    return study_file.read_yaml(Path(path))["train"]["steps"]


if __name__ == "__main__":
    unittest.main()
