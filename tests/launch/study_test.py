"""The parts of launch/study.py that start nothing and compute nothing: files, chains."""

import math
import os
import shutil
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
import study_mates  # noqa: E402
from command_line import BadInput, BadUsage  # noqa: E402
from study_measures import MEASURES  # noqa: E402

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

    # A source of an arm's width at a rate that no arm may have would be trained worse than any of them.
    def test_sources_train_at_a_rate_of_the_grid(self):
        for size in study_file.SIZES:
            figures = study_file.read_figures(study_file.STUDIES / "sizes" / f"{size}.yaml")
            self.assertTrue(min(figures["rates"]) <= figures["run"]["optimizer.lr"] <= max(figures["rates"]), size)

    def test_what_is_wrong_is_told(self):
        self.refused(STUDY.replace("claim", "clain"), "unknown key 'clain'", "did you mean 'claim'", "claim is missing")
        self.refused(STUDY.replace("model: source", "model: sorce"), "unknown key 'sorce'", "did you mean 'source'")
        self.refused(STUDY.replace("than: continued", "than: nobody"), "expected an arm", "'nobody'")
        self.refused(STUDY.replace("steps: arm}", "steps: 3 days}"), "steps '3 days'", "source, arm")
        self.refused(STUDY.replace("train: *arm]\ncompare", "upcycle: {}]\ncompare"), "the last command is a train")
        self.refused(STUDY.replace("{steps: arm}", "{steps: arm, optimizer.lr: 1.0}"), "leave optimizer.lr out")
        self.refused(STUDY + "claim: twice\n", "stands twice")
        self.refused(STUDY.replace("{steps: arm}", "{steps: arm, train.steps: 9}"), "train.steps is set by the study",
                     "`steps` says how many")
        self.refused(STUDY.replace("{steps: arm}", "{steps: arm, freze: [x]}"), "did you mean 'freeze'")
        self.refused(STUDY.replace("last: {", "last: {optimizer.lr: 1.0, "), "last: the learning rate", "`rates`")
        self.refused(STUDY.replace("last: {", "last: {data.seed: 1, "), "last: data.seed is set by the study")
        self.refused(STUDY.replace("{experts.reinit: 1.0}", "{seed: 7}"), "upcycle: seed is set by the study")
        self.refused(STUDY.replace("{experts.reinit: 1.0}", "{recipe: configs/upcycle/mixtral-8.yaml}"),
                     "mixtral-8.yaml: no such file; did you mean configs/upcycle/mixtral-8x.yaml?")
        self.refused(STUDY.replace("source: 40", "source: {tiny: 40}"), "says nothing of size micro")
        self.refused(STUDY.replace("better: kept", "beter: kept"), "did you mean 'better'")
        self.refused(STUDY.replace("better: kept, than: re-drawn, by: cost", "better: [kept], than: kept, by: [cost]"),
                     "better: expected an arm", "by: expected loss or cost or mates, found ['cost']")
        self.refused(STUDY.replace("model: source", "model: [source]"), "model: expected a name, found ['source']")
        self.refused(STUDY.replace("{steps: arm}", "{steps: arm, warmup: x}"), "warmup: expected a number, found 'x'")
        self.refused(STUDY.replace("source: 40", "source: forty"), "steps: source: expected a number, found 'forty'")
        self.refused(STUDY + "texts: {prose: 3}\n", "texts: prose: expected a folder or stdlib, found 3")
        self.refused(STUDY.replace("compare:", "  re drawn: [train: *arm]\n  re,drawn: [train: *arm]\ncompare:"),
                     "re,drawn: its runs would lie in the folder of those of 're drawn'")
        self.refused(STUDY.replace("{experts.reinit: 1.0}", "{calibrate: tekst}"),
                     "command 2: calibrate: unknown key 'tekst'; did you mean 'text'?")
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
        tuned = study_chain.Builder(self.read(STUDY + "tune_share: 0.5\n")).tuning("kept")
        self.assertEqual({run.seed for run in tuned}, {study_chain.TUNING_SEED})
        self.assertEqual([run.rate for run in tuned], study.rates)
        self.assertEqual(tuned[0].last.steps, 10)

    # A model from random weights owes nothing to what was trained before.
    def test_a_source_is_charged_where_something_of_it_stays(self):
        study = self.read(STUDY.replace("continued: [train: *source, train: *arm]", "continued: [train: *source, "
                                        "upcycle: {}, train: {steps: arm, model.init: random}]"))
        self.assertEqual(study_chain.Builder(study).run("continued", 1, 1e-3).charged, ())

    def test_a_teacher(self):
        build = study_chain.Builder(self.read(TAUGHT))
        alone, taught, drawn = (build.run(arm, 1, 1e-3) for arm in ("alone", "taught", "drawn"))
        self.assertEqual(taught.last.settings, alone.last.settings)
        self.assertNotEqual(taught.last.id, alone.last.id)
        self.assertEqual((taught.last.teacher, alone.last.teacher), (taught.stages[0].id, None))
        self.assertEqual(taught.charged, alone.charged)
        self.assertEqual(drawn.charged, (drawn.stages[0].id,))  # of random weights, and of what the source had learnt
        self.assertEqual(study_chain.differences(alone.story, taught.story), ["3 train.teacher null -> 1"])

    def test_what_is_wrong_with_a_teacher_is_told(self):
        for instead, *said in (
                ("teacher: 2", "command 3: teacher: expected the number of a train before it (1), found 2"),
                ("teacher: 1.0", "found 1.0"), ("teacher: source", "teacher: expected a number"),
                ("train.teacher.weight: 0.5", "command 3: train.teacher.* without a `teacher`"),
                ("teacher: 1, train.teacher.model: x", "train.teacher.model is set by the study")):
            self.refused(TAUGHT.replace("&taught {steps: arm, teacher: 1", f"&taught {{steps: arm, {instead}"), *said)
        self.refused(TAUGHT.replace("steps: source}", "steps: source, teacher: 1}"), "command 1: teacher", "none")


TAUGHT = """claim: A teacher helps.
arms:
  alone: [train: &source {model: source, steps: source}, upcycle: {}, train: {steps: arm}]
  taught: [train: *source, upcycle: {}, train: &taught {steps: arm, teacher: 1}]
  drawn: [train: *source, upcycle: {}, train: {steps: arm, teacher: 1, model.init: random}]
compare:
  - {better: taught, than: alone}
"""

MATES = """claim: A batch leaks.
rates: [0.0]
arms:
  free: [train: &source {model: source, steps: 9}, upcycle: {}, train: &pairs {steps: 5, batches: mates}]
  limited: [train: *source, upcycle: {}, train: {<<: *pairs, router.capacity_factor: 1.0}]
compare:
  - {better: free, than: limited, by: mates}
"""


class Ran:
    """An outcome, as far as the measure of mates looks at it."""

    def __init__(self, *losses):
        self.steps = [{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)]

    def changes(self):
        return study_mates.changes_of(self.steps)


class Mates(unittest.TestCase):
    read, refused = Files.read, Files.refused

    def setUp(self):
        Files.setUp(self)

    def test_names_are_those_of_the_files(self):
        self.assertEqual(set(MEASURES), set(study_file.MEASURES))
        self.assertEqual(set(study_chain.LAYOUTS), set(study_file.BATCHES))

    def test_a_chain_with_laid_out_batches(self):
        study = self.read(MATES)
        run = study_chain.Builder(study).run("free", 1, 0.0)
        self.assertEqual((run.last.batches, run.stages[0].batches), ("mates", None))
        self.assertEqual(run.last.settings["data"]["shuffle"], False)
        self.assertEqual(run.last.settings["optimizer"]["lr"], 0.0)
        small = study_chain.Builder(self.read(MATES, "small")).run("free", 1, 0.0).last.settings["train"]
        self.assertEqual((small["global_batch"], small["micro_batch"]), (16, 16))  # else four sequences are one loss
        with self.assertRaisesRegex(BadUsage, "nothing is learnt"):
            study_chain.plant(study, "free")

    def test_what_is_wrong_is_told(self):
        self.refused(MATES.replace("rates: [0.0]", "rates: [1.0e-3]"), "rates: [0.0] and batches belong together")
        self.refused(MATES.replace(", batches: mates", ""), "belong together", "needs `batches: mates`")
        self.refused(MATES.replace("batches: mates", "batches: mate"), "did you mean 'mates'")
        self.refused(MATES.replace("[0.0]", "[0.0, 1.0e-3]"), "or 0.0 alone")
        self.refused(MATES.replace("by: mates", "by: mates, at: flops, worth: 0.1"), "at says nothing", "worth says")
        self.refused(MATES.replace("steps: 9", "steps: 9, batches: mates"), "belongs to the last train")
        study = self.read(MATES.replace("batches: mates", "batches: mates, train.micro_batch: 1"))
        with self.assertRaisesRegex(BadUsage, "a sequence alone has no mates"):
            study_chain.Builder(study).run("free", 1, 0.0)

    def tokens(self, sequences, length):
        """Of sequence i all tokens are i."""
        source = Path(self.temporary.name) / "text.h5"
        with h5py.File(source, "w") as file:
            file["tokens"] = np.repeat(np.arange(sequences, dtype="<u4"), length)
            file.attrs["vocab_size"], file.attrs["format"] = 99, np.bytes_(b"upmoe-tokens-1")
        return source

    # Five steps are three pairs.
    def test_a_pair_of_batches_has_one_sequence_in_common(self):
        length, batch, to = 4, 3, Path(self.temporary.name) / "mates.h5"
        settings = {"data": {"seq_len": length}, "train": {"steps": 5, "micro_batch": batch}}
        study_mates.write_tokens(self.tokens(40, length), to, settings)
        with h5py.File(to, "r") as file:
            tokens, mask = file["tokens"][:].reshape(-1, length), file["loss_mask"][:].reshape(-1, length)
            self.assertEqual(file["document_ends"][-1], tokens.size)
            self.assertEqual((file.attrs["vocab_size"], file.attrs["format"]), (99, b"upmoe-tokens-1"))
        self.assertEqual(len(tokens), 6 * batch + 1)  # one more, whose first token is the last target
        tokens, mask = tokens[:-1].reshape(3, 2, batch, length), mask[:-1].reshape(3, 2, batch, length)
        seen = []
        for pair in range(3):
            places = [set(np.flatnonzero(mask[pair, step].any(axis=1))) for step in (0, 1)]
            self.assertEqual(places, [{pair % batch}] * 2)
            first, second = ([int(row[0]) for row in tokens[pair, step]] for step in (0, 1))
            self.assertEqual(first[pair % batch], second[pair % batch])
            self.assertEqual(len({*first, *second}), 2 * batch - 1)
            seen += [*first, *second]
            # The target behind the sequence's end is a mate's token.
            self.assertEqual(mask[pair, 0, pair % batch].tolist(), [0, 1, 1, 1])
        self.assertEqual(len(set(seen)), 3 * (2 * batch - 1))
        with self.assertRaisesRegex(BadInput, "4 sequences of 4 tokens; two batches of 3 .* in common need 5"):
            study_mates.write_tokens(self.tokens(4, length), to, settings)

    def test_changes_are_counted_to_the_bit(self):
        bit = np.nextafter(2.0, 3.0)
        found = Ran(1.0, 1.0, 2.0, bit, 3.0, 3.5, 9.0).changes()
        self.assertEqual((found.sequences, found.changed, found.largest), (3, 2, 0.5))
        self.assertEqual(Ran(2.0, bit).changes().largest, bit - 2.0)
        for not_a_number in (None, math.inf, math.nan):
            with self.assertRaisesRegex(BadInput, "step 2: the loss is no number"):
                Ran(1.0, not_a_number).changes()
        skipped = Ran(1.0, 1.0, 2.0, 2.0)
        del skipped.steps[1]
        with self.assertRaisesRegex(BadInput, "log.every must be 1"):
            skipped.changes()

    def test_one_change_decides(self):
        comparison, same, other = self.read(MATES).compare[0], Ran(1.0, 1.0), Ran(1.0, 1.5)

        def verdict(free, limited):
            found, word = MEASURES["mates"].judge(comparison, {"free": free, "limited": limited})
            return found.mean, str(word)

        self.assertEqual(verdict([same, same], [same, other]), (-0.5, "supported"))
        self.assertEqual(verdict([same, other], [other, other]), (-0.5, "not supported"))
        self.assertEqual(verdict([same], [same]), (0.0, "undecided ('limited' changed none either)"))
        self.assertEqual(verdict([same], [other])[1], "supported")  # a single pair is enough
        self.assertEqual(verdict([Ran(1.0)], [other])[1], "None")


# file, what stands there, what is planted: the tests above must notice
PLANTED = [
    ("study_chain.py", "needed |= {stage.teacher} if drawn else {stage.teacher, stage.before}",
     "needed |= {stage.teacher, stage.before}"),
    ("study_chain.py", "needed |= {stage.teacher} if drawn else {stage.teacher, stage.before}",
     "needed |= set() if drawn else {stage.before}"),
    ("study_chain.py", 'content |= {"teacher": self.teacher} if self.teacher else {}', "pass"),
    ("study_chain.py", "ORDERS - 1 if last else trainings", "trainings"),
    ("study_chain.py", '"text", "texts", "before",', '"text", "texts",'),
    ("study_chain.py", 'nested(overrides | {"seed": seed}', "nested(overrides"),
    ("study_chain.py", "share if last else 1.0", "1.0"),
    ("study_chain.py", "keys |= self.study.last |", "keys |="),
    ("study_file.py", "total += float(match[1] or 1)", "total = float(match[1] or 1)"),
    ("study_mates.py", "mask[counted_places(pairs, batch), 1:] = 1", "mask[counted_places(pairs, batch)] = 1"),
    ("study_mates.py", "order.append(taken)", "pass"),
    ("study_mates.py", "            taken += batch - 1", "            taken += 0"),
    ("study_mates.py", "in pairs if a != b", "in pairs if a != b and abs(a - b) > 1e-12"),
    ("study_mates.py", ', "train.global_batch": batch}', "}"),
    ("study_measures.py", "if any(a.changed for a in first):", "if all(a.changed for a in first):"),
    ("study_measures.py", "if any(b.changed for b in second):", "if all(b.changed for b in second):"),
]


def expect_noticed(test, file, classes, planted):
    """Each error of a list as the one above, that the test classes of a file must notice."""
    none = ("study_chain.py", "class Builder:", "class Builder:")
    for name, stands, instead in [none, *planted]:
        text = (ROOT / "launch" / name).read_text(encoding="utf-8")
        test.assertEqual(text.count(stands), 1, f"{name}: {stands}")
        with tempfile.TemporaryDirectory() as folder:
            for path in (ROOT / "launch").glob("*.py"):
                shutil.copy(path, folder)
            root = "ROOT = Path(__file__).resolve().parent.parent"
            there = Path(folder) / "study_file.py"
            there.write_text(there.read_text(encoding="utf-8").replace(root, f"ROOT = Path({str(ROOT)!r})"))
            text = (Path(folder) / name).read_text(encoding="utf-8")
            (Path(folder) / name).write_text(text.replace(stands, instead), encoding="utf-8")
            done = subprocess.run([sys.executable, file, *classes], capture_output=True, text=True, check=False,
                                  env=os.environ | {"PLANTED_SOURCES": folder})
        test.assertEqual(done.returncode == 0, stands == instead, f"{name}: {instead}\n{done.stderr}")


@unittest.skipIf("PLANTED_SOURCES" in os.environ, "started by itself")
class Planted(unittest.TestCase):
    def test_errors_are_noticed(self):
        expect_noticed(self, __file__, ["Files", "Mates"], PLANTED)


if __name__ == "__main__":
    unittest.main()
