"""launch/study.py with a pretended program: statistics, plan, chains, resumption, refusals; nothing is trained."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = Path(os.environ.get("PLANTED_SOURCES", ROOT / "launch"))  # where this test starts itself with errors in them
sys.path.append(str(LAUNCH))
import study_chain  # noqa: E402
import study_file  # noqa: E402
import study_statistics as statistics  # noqa: E402
from command_line import BadUsage  # noqa: E402
from study_plan import Measured  # noqa: E402

STUDY = """claim: Nothing re-drawn is better.
last: {router.aux_loss: 0.01}
steps: {source: 40, arm: 20}
rates: [2.0e-4, 2.0e-3]
arms:
  kept: [train: &source {model: source, steps: source}, upcycle: {experts.reinit: 0.0}, train: &arm {steps: arm}]
  re-drawn: [train: *source, upcycle: {experts.reinit: 1.0}, train: *arm]
  continued: [train: *source, train: *arm]
compare:
  - {better: kept, than: re-drawn, worth: 0.001}
  - {better: kept, than: continued, at: flops, with_source: true}
  - {better: kept, than: re-drawn, by: cost, at: tokens}
"""


class Statistics(unittest.TestCase):
    # By hand: mean 0.2, deviation 0.1, t of two degrees of freedom 4.302653.
    def test_interval(self):
        found = statistics.interval([0.1, 0.2, 0.3])
        self.assertAlmostEqual(found.mean, 0.2)
        self.assertAlmostEqual(found.high - found.mean, 4.302653 * 0.1 / math.sqrt(3), places=6)
        self.assertAlmostEqual(found.low + found.high, 0.4)
        one = statistics.interval([0.1])
        self.assertEqual((one.low, one.high), (-math.inf, math.inf))

    def test_verdicts(self):
        clear = statistics.verdict(statistics.interval([-0.10, -0.11, -0.12]))
        self.assertEqual(str(clear), "supported")
        self.assertEqual(str(statistics.verdict(statistics.interval([0.10, 0.11, 0.12]))), "not supported")
        # A gain that is certain and too small is none.
        small = statistics.interval([-0.0010, -0.0011, -0.0012])
        self.assertEqual(statistics.verdict(small).word, "supported")
        self.assertEqual(statistics.verdict(small, worth=0.005).word, "not supported")
        self.assertEqual(statistics.verdict(statistics.interval([0.0, 0.0, 0.0]), worth=0.005).word, "not supported")

    def test_seeds_that_would_decide(self):
        open_ = statistics.interval([-0.10, 0.02, -0.04])
        found = statistics.verdict(open_)
        self.assertEqual(found.word, "undecided")
        self.assertLess(statistics.half_width(open_.deviation, found.seeds), -open_.mean)
        self.assertGreaterEqual(statistics.half_width(open_.deviation, found.seeds - 1), -open_.mean)
        self.assertIn(f"about {found.seeds} seeds", str(found))
        self.assertEqual(statistics.verdict(statistics.interval([-0.1])).seeds, 2)
        self.assertIn("more than 1000", str(statistics.verdict(statistics.interval([-1.0, 0.0, 1.0001]))))

    def curve(self, losses, tokens):
        return statistics.Curve(np.array(losses), {"tokens": np.array(tokens, dtype=float)})

    def test_equal_cost_and_equal_loss(self):
        a, b = self.curve([4.0, 3.0, 2.0], [0, 10, 20]), self.curve([4.0, 3.5, 3.0], [0, 20, 40])
        self.assertAlmostEqual(statistics.loss_difference(a, b, "tokens"), 2.0 - 3.5)
        self.assertAlmostEqual(statistics.cost_ratio(a, b, "tokens"), math.log(10 / 40))
        charged = a.later({"tokens": 30.0})
        self.assertAlmostEqual(statistics.loss_difference(charged, b, "tokens"), 3.0 - 3.0)
        self.assertAlmostEqual(statistics.cost_ratio(charged, b, "tokens"), 0.0)
        self.assertAlmostEqual(a.to_reach(2.5, "tokens"), 15)
        self.assertTrue(math.isnan(a.to_reach(1.0, "tokens")))
        self.assertTrue(math.isnan(charged.at("tokens", 5)))


class Files(unittest.TestCase):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.path = Path(self.temporary.name) / "own.yaml"

    def read(self, text, size="micro"):
        self.path.write_text(text, encoding="utf-8")
        return study_file.read_study(self.path, size)

    def refused(self, text, *words):
        with self.assertRaises(BadUsage) as raised:
            self.read(text)
        for word in words:
            self.assertIn(word, str(raised.exception))

    def test_shipped_studies_are_read_in_each_of_their_sizes(self):
        for name in study_file.names():
            sizes = study_file.read_yaml(study_file.find(name)).get("sizes", study_file.SIZES)
            for size in sizes:
                study = study_file.read_study(study_file.find(name), size)
                runs = [study_chain.Builder(study).run(arm, 1, study.rates[0]) for arm in study.arms]
                self.assertEqual(len({run.last.id for run in runs}), len(runs), f"{name}: two arms are the same")
                for run in runs:
                    self.assertEqual(run.last.settings["data"]["seed"], runs[0].last.settings["data"]["seed"])

    def test_what_is_wrong_is_told(self):
        self.refused(STUDY.replace("claim", "clain"), "unknown key 'clain'", "did you mean 'claim'", "claim is missing")
        self.refused(STUDY.replace("model: source", "model: sorce"), "unknown key 'sorce'", "did you mean 'source'")
        self.refused(STUDY.replace("than: continued", "than: nobody"), "expected an arm", "'nobody'")
        self.refused(STUDY.replace("steps: arm}", "steps: 3 days}"), "steps '3 days'", "source, arm")
        self.refused(STUDY.replace("train: *arm]\ncompare", "upcycle: {}]\ncompare"), "the last command is a train")
        self.refused(STUDY.replace("{steps: arm}", "{steps: arm, optimizer.lr: 1.0}"), "leave optimizer.lr out")
        self.refused(STUDY + "claim: twice\n", "stands twice")
        self.refused(STUDY.replace("source: 40", "source: {tiny: 40}"), "says nothing of size micro")
        self.refused(STUDY.replace("better: kept", "beter: kept"), "did you mean 'better'")
        self.refused(STUDY.replace("model: source", "model: [source]"), "model: expected a name, found ['source']")
        self.refused(STUDY.replace("{steps: arm}", "{steps: arm, warmup: x}"), "warmup: expected a number, found 'x'")
        self.refused(STUDY.replace("source: 40", "source: forty"), "steps: source: expected a number, found 'forty'")
        self.refused(STUDY + "texts: {prose: 3}\n", "texts: prose: expected a folder or stdlib, found 3")
        self.refused("[1]", "expected a map")
        self.refused("a: [", "not YAML")

    def test_steps(self):
        named = {"source": 400, "arm": 100}
        for text, steps in ((7, 7), ("arm", 100), ("0.25 source", 100), ("source + 2 arm", 600)):
            self.assertEqual(study_file.steps_of(text, named), steps)
        for text in ("", "lots", "0.001 arm", "-3", "arm arm"):
            with self.assertRaises(ValueError, msg=text):
                study_file.steps_of(text, named)

    def test_chains(self):
        study = self.read(STUDY)
        build = study_chain.Builder(study)
        kept, drawn, continued = (build.run(arm, 1, 1e-3) for arm in study.arms)
        self.assertEqual([stage.kind for stage in kept.stages], ["train", "upcycle", "train"])
        self.assertEqual({run.stages[0].id for run in (kept, drawn, continued)}, {kept.stages[0].id})  # one source
        self.assertEqual(kept.charged, (kept.stages[0].id,))
        self.assertNotEqual(kept.last.id, drawn.last.id)
        self.assertEqual(kept.last.settings["optimizer"]["lr"], 1e-3)
        self.assertEqual(kept.last.settings["router"], {"aux_loss": 0.01})
        self.assertEqual(kept.stages[0].settings["optimizer"]["lr"], 2e-3)
        self.assertNotEqual(kept.stages[0].settings["data"]["seed"], kept.last.settings["data"]["seed"])
        other = build.run("kept", 2, 1e-3)
        self.assertFalse({stage.id for stage in other.stages} & {stage.id for stage in kept.stages})
        self.assertEqual(other.stages[1].settings["seed"], 2)
        again = study_chain.Builder(self.read(STUDY)).run("kept", 1, 1e-3)
        self.assertEqual([stage.id for stage in again.stages], [stage.id for stage in kept.stages])
        tuned = build.tuning("kept")
        self.assertEqual({run.seed for run in tuned}, {study_chain.TUNING_SEED})
        self.assertEqual([run.rate for run in tuned], study.rates)
        self.assertEqual(tuned[0].last.steps, round(20 * study.figures["tune_share"]))

    # A model from random weights owes nothing to what was trained before.
    def test_a_source_is_charged_where_something_of_it_stays(self):
        study = self.read(STUDY.replace("continued: [train: *source, train: *arm]", "continued: [train: *source, "
                                        "upcycle: {}, train: {steps: arm, model.init: random}]"))
        self.assertEqual(study_chain.Builder(study).run("continued", 1, 1e-3).charged, ())

    # Five evaluations, of which the probe made one.
    def test_estimates(self):
        stage = study_chain.Builder(self.read(STUDY)).run("kept", 1, 1e-3).last
        measured = Measured(2.0, 5.0, 100.0, 2048, 4096, 1, 1)
        self.assertAlmostEqual(measured.seconds(stage), 20 * 2.0 + 5.0 + 4 * 2.0 * 2 / 3)
        self.assertAlmostEqual(measured.flops(stage), 20 * 2048 * 100.0)


# file, what stands there, what is planted: the tests above must notice
PLANTED = [
    ("study_statistics.py", "stdtrit(pairs - 1,", "stdtrit(pairs,"),
    ("study_statistics.py", "values.std(ddof=1)", "values.std()"),
    ("study_statistics.py", "if difference.low > bound - worth:", "if difference.low > bound:"),
    ("study_statistics.py", "distance = max(", "distance = min("),
    ("study_statistics.py", "amount = min(a.end(axis)", "amount = max(a.end(axis)"),
    ("study_statistics.py", "loss = max(float(a.loss[-1])", "loss = min(float(a.loss[-1])"),
    ("study_chain.py", "charged = []  # nothing", "pass  # nothing"),
    ("study_chain.py", "ORDERS - 1 if last else trainings", "trainings"),
    ("study_chain.py", '"text", "texts", "before",', '"text", "texts",'),
    ("study_chain.py", 'nested(overrides | {"seed": seed}', "nested(overrides"),
    ("study_chain.py", "share if last else 1.0", "1.0"),
    ("study_chain.py", "keys |= self.study.last |", "keys |="),
    ("study_file.py", "total += float(match[1] or 1)", "total = float(match[1] or 1)"),
    ("study_plan.py", 'settings["train"]["eval_every"]) - 1', 'settings["train"]["eval_every"])'),
]


@unittest.skipIf("PLANTED_SOURCES" in os.environ, "started by itself")
class Planted(unittest.TestCase):
    def test_errors_are_noticed(self):
        none = ("study_chain.py", "class Builder:", "class Builder:")
        for name, stands, planted in [none, *PLANTED]:
            text = (ROOT / "launch" / name).read_text(encoding="utf-8")
            self.assertEqual(text.count(stands), 1, f"{name}: {stands}")
            with tempfile.TemporaryDirectory() as folder:
                for path in (ROOT / "launch").glob("*.py"):
                    shutil.copy(path, folder)
                root = "ROOT = Path(__file__).resolve().parent.parent"
                file = Path(folder) / "study_file.py"
                file.write_text(file.read_text(encoding="utf-8").replace(root, f"ROOT = Path({str(ROOT)!r})"))
                text = (Path(folder) / name).read_text(encoding="utf-8")
                (Path(folder) / name).write_text(text.replace(stands, planted), encoding="utf-8")
                done = subprocess.run([sys.executable, __file__, "Statistics", "Files"], capture_output=True, text=True,
                                      check=False, env=os.environ | {"PLANTED_SOURCES": folder})
            self.assertEqual(done.returncode == 0, stands == planted, f"{name}: {planted}\n{done.stderr}")


class Whole(unittest.TestCase):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.folder = Path(self.temporary.name)
        self.file, self.log = self.folder / "own.yaml", self.folder / "log.txt"
        self.write(STUDY)
        self.make_tokens("out")

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
             ROOT / "tests/support/pretended_upmoe.py", *map(str, arguments)], capture_output=True, text=True,
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
        self.assertIn("seconds", (self.folder / "out/timings.md").read_text(encoding="utf-8"))
        self.assertTrue((self.folder / "out/curves.png").read_bytes().startswith(b"\x89PNG"))
        # Nothing heavy stays: neither checkpoints nor mixtures.
        self.assertFalse(list(self.folder.glob("out/stages/*/run/checkpoints")))
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
        self.assertIn("is no folder", found.stderr)

    def test_too_little_disk_is_told(self):
        script = ("import shutil, sys, collections; sys.path.insert(0, sys.argv.pop(1)); "
                  "shutil.disk_usage = lambda _: collections.namedtuple('U', 'free')(1); "
                  "sys.argv[0] = 'study'; import study; from command_line import run_tool; "
                  "sys.exit(run_tool('upmoe study', study.main))")
        found = subprocess.run(
            [sys.executable, "-c", script, ROOT / "launch", self.file, "--out", self.folder / "out", "--upmoe",
             ROOT / "tests/support/pretended_upmoe.py"], capture_output=True, text=True, check=False)
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
        listed = subprocess.run([sys.executable, ROOT / "launch/study.py", "--list"], capture_output=True, text=True,
                                check=False).stdout
        for name in study_file.names():
            self.assertRegex(listed, rf"(?m)^{name} +\d+ arms  ")


def yaml_steps(path):
    return study_file.read_yaml(Path(path))["train"]["steps"]


if __name__ == "__main__":
    unittest.main()
