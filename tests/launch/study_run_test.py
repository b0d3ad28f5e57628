"""upmoe study for real, in seconds: a model of two layers, two arms, two seeds. The chain works from text to verdict,
FLOPs are the run's own, a stopped study goes on, and twice the same study is the same to the bit.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "launch"))
import study_file  # noqa: E402
from study_chain import Builder  # noqa: E402
from study_check import Check  # noqa: E402
from study_work import Work  # noqa: E402

UPMOE = os.environ["UPMOE"]
STUDY = """claim: More steps end better.
texts: {text: TEXT}
text: {megabytes: 0.6, vocab: 300}
seq_len: 32
eval_sequences: 8
evaluations: 2
steps: {source: 8, arm: 12}
rates: [3.0e-3]
models: {source: {hidden_size: 64, intermediate_size: 88, num_hidden_layers: 2}}
recipe: {target.num_experts: 6, target.num_experts_per_tok: 2, target.moe_intermediate_size: 22,
         target.shared_expert_intermediate_size: 88}
run: {train.global_batch: 4, train.micro_batch: 4}
arms:
  long: [train: &source {model: source, steps: source}, upcycle: {}, train: {steps: arm}]
  short: [train: *source, upcycle: {}, train: {steps: 2}]
compare:
  - {better: long, than: short}
  - {better: long, than: short, at: flops}
"""

# No limit, one for the experts of a batch, one for each sequence.
LEAK = STUDY[STUDY.index("texts:"):STUDY.index("arms:")].replace("3.0e-3", "0.0") + """claim: A batch leaks.
last: {router.aux_loss: 0.0}
arms:
  free: [train: &source {model: source, steps: source}, upcycle: {}, train: &pairs {steps: 16, batches: mates}]
  batch:
    - train: *source
    - upcycle: {}
    - train: &batch {<<: *pairs, router.capacity_factor: 1.0, router.capacity_pool: micro_batch}
  sequence: [train: *source, upcycle: {}, train: {<<: *batch, router.capacity_pool: sequence}]
compare:
  - {better: free, than: batch, by: mates}
  - {better: sequence, than: batch, by: mates}
  - {better: batch, than: free, by: mates}
"""


# One mixture with and without its dense parent for a teacher.
TAUGHT = STUDY[STUDY.index("texts:"):STUDY.index("arms:")] + """claim: A teacher helps.
arms:
  alone: [train: &source {model: source, steps: source}, upcycle: {}, train: {steps: arm}]
  taught:
    - train: *source
    - upcycle: {}
    - train: {steps: arm, teacher: 1, train.teacher.weight: 0.5, train.teacher.temperature: 2.0}
compare:
  - {better: taught, than: alone}
  - {better: taught, than: alone, at: flops}
"""


class StudyRun(unittest.TestCase):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.folder = Path(self.temporary.name)
        self.file = self.folder / "own.yaml"
        self.file.write_text(STUDY.replace("TEXT", str(self.text())), encoding="utf-8")

    def text(self):
        """Sources of this project: more than half a megabyte in twenty files, which is what a text must have."""
        folder = self.folder / "text"
        folder.mkdir()
        sources = sorted([*ROOT.glob("launch/*.py"), *ROOT.glob("trainer/**/*.cpp"), *ROOT.glob("tests/**/*.py")])
        for i, path in enumerate(sources):
            (folder / f"{i}.txt").write_bytes(path.read_bytes())
        return folder

    def words(self, out, *arguments, seeds=2):
        return [UPMOE, "study", self.file, "--seeds", str(seeds), "--out", self.folder / out, *arguments]

    def study(self, out, *arguments, **options):
        done = subprocess.run(self.words(out, *arguments, **options), capture_output=True, text=True, check=False,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def test_from_text_to_verdict(self):
        plan = self.study("one", "--dry").stdout
        self.assertIn("of disk at a time", plan)
        found = self.study("one")
        self.assertIn("'long' ends below 'short' at equal tokens", found.stdout)
        result = json.loads((self.folder / "one/result.json").read_text(encoding="utf-8"))
        for seed in result["arms"]["long"]["seeds"]:
            self.assertEqual(seed["tokens"], 12 * 4 * 32)
            self.assertLess(seed["heldout_loss"], seed["curve"]["loss"][0])
        # What the plan had said of FLOPs, from its probe, is what the run counted.
        flops = result["arms"]["long"]["seeds"][0]["flops"]
        self.assertRegex(plan, rf"(?m)^long .* {flops:.3g}".replace("+", r"\+"))
        self.assertEqual(self.study("one").stdout.splitlines()[-1], found.stdout.splitlines()[-1])
        self.study("two")
        for name in ("table.md", "result.json"):
            self.assertEqual((self.folder / "one" / name).read_bytes(), (self.folder / "two" / name).read_bytes())
        self.stopped("three")
        self.study("three")
        self.assertEqual((self.folder / "three/table.md").read_bytes(), (self.folder / "one/table.md").read_bytes())

    # A study that does not see this would see nothing smaller either.
    def test_a_planted_arm_is_found_worse(self):
        found = self.study("planted", "--plant", "long", seeds=3).stdout
        self.assertIn("'long' ends below 'long, a tenth of the rate' at equal tokens: supported", found)
        result = json.loads((self.folder / "planted/result.json").read_text(encoding="utf-8"))
        self.assertAlmostEqual(result["arms"]["long, a tenth of the rate"]["rate"], 3e-4)
        self.assertLess(result["comparisons"][0]["high"], 0)

    # Dropping alone is not what does it: a limit of each sequence's own drops as well.
    def test_a_shared_capacity_leaks_and_nothing_else_does(self):
        self.file.write_text(LEAK.replace("TEXT", str(self.folder / "text")), encoding="utf-8")
        self.study("leak")
        result = json.loads((self.folder / "leak/result.json").read_text(encoding="utf-8"))
        self.assertEqual([found["verdict"] for found in result["comparisons"]],
                         ["supported", "supported", "not supported"])
        counts = {arm: [(seed["sequences"], seed["changed"]) for seed in found["seeds"]]
                  for arm, found in result["arms"].items()}
        self.assertEqual((counts["free"], counts["sequence"]), ([(8, 0)] * 2, [(8, 0)] * 2))
        self.assertTrue(all(changed > 0 for _, changed in counts["batch"]), counts)
        drops = {arm: json.loads((self.folder / f"leak/runs/{arm}-seed1/metrics.jsonl").read_text().splitlines()[-2])
                 for arm in counts}
        self.assertGreater(drops["sequence"]["dropped_share"], 0)
        self.assertEqual(drops["free"]["dropped_share"], 0)

    def test_a_mixture_learns_from_its_dense_parent(self):
        self.file.write_text(TAUGHT.replace("TEXT", str(self.folder / "text")), encoding="utf-8")
        plan = self.study("taught", "--dry").stdout
        found = self.study("taught").stdout
        for axis in ("tokens", "FLOPs"):
            self.assertRegex(found, f"'taught' ends below 'alone' at equal {axis}: (not )?(supported|undecided)")
        arms = json.loads((self.folder / "taught/result.json").read_text(encoding="utf-8"))["arms"]
        alone, taught = (arms[arm]["seeds"] for arm in ("alone", "taught"))
        for one, other in zip(alone, taught, strict=True):
            self.assertEqual(one["curve"]["loss"][0], other["curve"]["loss"][0])  # one mixture, before any step
            self.assertNotEqual(one["heldout_loss"], other["heldout_loss"])
            self.assertGreater(other["flops"], one["flops"])
            self.assertEqual(other["stages"][:2], one["stages"][:2])
            # The source is charged once, though it begins the chain and teaches.
            self.assertAlmostEqual(other["flops_with_source"] - other["flops"],
                                   one["flops_with_source"] - one["flops"])
        # What the plan had said of FLOPs, from its probe, is what the run counted, its teacher's with it.
        self.assertRegex(plan, rf"(?m)^taught .* {taught[0]['flops']:.3g}".replace("+", r"\+"))
        lines = (self.folder / "taught/runs/taught-seed1/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = map(json.loads, lines)
        self.assertTrue(all(r["distill_loss"] > 0 and r["flops_teacher"] > 0 for r in records if "kind" not in r))

    def test_wrong_keys_are_told_before_anything_is_computed(self):
        short = "upcycle: {}, train: {steps: 2}"
        planted = [  # instead of `short`, and what is said of it
            ("upcycle: {}, train: {steps: 2, train.stepps: 3}", "command 3 (train)", "'train.stepps'", "train.steps"),
            ("upcycle: {}, train: {steps: 2, optimizer.beta1: 1.5}", "command 3 (train)", "optimizer.beta1"),
            ("upcycle: {}, train: {steps: 2, router.kind: switch}", "command 3 (train)", "switch"),  # two for a token
            ("upcycle: {experts.reinitt: 0.5}, train: {steps: 2}", "command 2 (upcycle)", "'experts.reinitt'",
             "experts.reinit"),
            ("upcycle: {target.num_experts_per_tok: 9}, train: {steps: 2}", "command 2 (upcycle)", "9 of 6 experts"),
        ]
        text = self.file.read_text(encoding="utf-8")
        self.assertEqual(text.count(short), 1)
        for instead, *said in planted:
            self.file.write_text(text.replace(short, instead), encoding="utf-8")
            done = subprocess.run(self.words("none"), capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, 2, done.stderr)
            for words in ("own.yaml: arm 'short': ", "nothing was begun", *said):
                self.assertIn(words, done.stderr)
            self.assertNotIn("/tmp/upmoe-study", done.stderr)
            self.assertFalse((self.folder / "none").exists())

    def stopped(self, out):
        with subprocess.Popen([str(word) for word in self.words(out)], stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True) as process:
            for line in process.stderr:
                if "train 12 steps" in line:
                    break
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
        self.assertEqual(process.returncode, 75)


class Shapes(unittest.TestCase):
    """What the claims of the shipped studies are about."""

    def flops(self, model, seq_len):
        told = subprocess.check_output([UPMOE, "cost", model, "--seq-len", str(seq_len), "--json"], text=True)
        return json.loads(told)[0]["train_flops_per_token"]

    # A quarter of the cost, of models whose tokens cost something else, would be another claim.
    def test_cost_has_the_flop_ratios_of_the_announcements_models(self):
        large = self.flops("qwen1.5-7b", 4096)
        self.assertAlmostEqual(self.flops("qwen1.5-moe-a2.7b", 4096) / large, 0.338, delta=0.0005)
        self.assertAlmostEqual(self.flops("qwen1.5-1.8b", 4096) / large, 0.226, delta=0.0005)
        for size in study_file.SIZES:
            study = study_file.read_study(study_file.find("cost"), size)
            with self.subTest(size), tempfile.TemporaryDirectory() as folder:
                check, build = Check(Work(Path(folder), [UPMOE], study), Path(folder)), Builder(study)
                mixture, dense = build.first("mixture"), build.first("large dense")
                self.assertEqual([check.run(run) for run in (mixture, dense)], [None, None])
                shapes = [check.shapes[stage.id] for stage in (*mixture.stages[:2], dense.last)]
                source, moe, large = (self.flops(shape, study.figures["seq_len"]) for shape in shapes)
                self.assertAlmostEqual(moe / large, 0.337, delta=0.002)
                self.assertAlmostEqual(source / large, 0.222, delta=0.0065)


if __name__ == "__main__":
    unittest.main()
