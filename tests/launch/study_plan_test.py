"""What launch/study_plan.py foretells, of numbers made by hand: a probe, seconds and disk."""

import json
import os
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

sys.path.append(os.environ.get("PLANTED_SOURCES", str(Path(__file__).resolve().parent.parent.parent / "launch")))
import study_chain  # noqa: E402
import study_file  # noqa: E402
import study_test  # noqa: E402
from study_plan import Measured, Plan, measure  # noqa: E402


def builder():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.yaml"
        path.write_text(study_test.STUDY, encoding="utf-8")
        return study_chain.Builder(study_file.read_study(path, "micro"))


class Probe(unittest.TestCase):
    """What is read out of the folder that a probe left."""

    def measured(self, seconds, looks, wall_s, stage=None):
        """`seconds`: of steps by their number; `looks`: of evaluations."""
        with tempfile.TemporaryDirectory() as folder:
            lines = [{"step": step, "seconds": s} for step, s in seconds.items()]
            lines += [{"kind": "eval", "step": 0, "seconds": s} for s in looks]
            (Path(folder) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            record = {"wall_s": wall_s, "flops_per_token": 100.0, "checkpoint_bytes": 7}
            work = SimpleNamespace(record=lambda _: record, run_dir=lambda _: Path(folder))
            return measure(work, stage or builder().probes()[0].last)

    # Two slow steps are start-up, not the pace; so is what neither steps nor evaluations took.
    def test_a_step_is_a_later_one(self):
        found = self.measured({1: 4.0, 2: 1.5, 3: 0.5, 4: 0.25, 5: 0.5}, [0.75, 1.0, 0.75], 15.0)
        self.assertEqual((found.step_s, found.eval_s, found.once_s), (0.5, 0.75, 15.0 - 5 * 0.5 - 3 * 0.75))
        figures = builder().study.figures
        self.assertEqual(found.step_tokens, figures["run"]["train.global_batch"] * figures["seq_len"])
        self.assertEqual((found.flops_per_token, found.checkpoint_bytes, found.model_bytes), (100.0, 7, 0))

    # A run that logs every seventh step logs its first and its last; one of a single step has no other.
    def test_where_few_steps_are_logged(self):
        found = self.measured({1: 4.0, 5: 0.5}, [0.75], 15.0)
        self.assertEqual((found.step_s, found.once_s), (0.5, 15.0 - 5 * 0.5 - 0.75))
        run = builder().study
        short = study_chain.Builder(run).probes()[0].last
        short.settings["train"]["steps"] = 1
        found = self.measured({1: 4.0}, [0.75, 0.75], 6.5, short)
        self.assertEqual((found.step_s, found.once_s), (4.0, 1.0))

    # Of a probe that was stopped, wall_s is of its last start alone.
    def test_no_time_is_negative(self):
        self.assertEqual(self.measured({1: 4.0, 2: 1.5, 3: 0.5, 4: 0.5, 5: 0.5}, [0.5], 0.25).once_s, 0.0)

    # A checkpoint that is written beside a step slows it, and the plan would take that for the pace of all.
    def test_a_probe_saves_behind_its_last_step(self):
        for run in builder().probes():
            for stage in run.stages:
                if stage.kind == "train":
                    self.assertEqual(stage.settings["checkpoint"]["every"], stage.steps)
                    self.assertEqual(stage.steps, study_chain.PROBE_STEPS)
        self.assertEqual(builder().run("kept", 1, 1e-3).last.settings["checkpoint"]["every"], 5)


class Estimates(unittest.TestCase):
    # Six evaluations: before the first step and behind each fourth.
    def test_estimates(self):
        run = builder().run("kept", 1, 1e-3)
        measured = Measured(2.0, 0.5, 5.0, 100.0, 2048, 1, 1)
        self.assertAlmostEqual(measured.seconds(run.last), 5.0 + 20 * 2.0 + 6 * 0.5)
        self.assertAlmostEqual(measured.flops(run.last), 20 * 2048 * 100.0)
        self.assertAlmostEqual(Measured(0.0, 0.0, 3.0, 0.0, 1, 0, 1).seconds(run.stages[1]), 3.0)  # an upcycle

    # Three checkpoints of one run and its mixture, and the source; what lies there takes no more place.
    def test_disk_is_asked_for_what_is_to_come(self):
        build, done = builder(), set()
        runs = [build.run(arm, 1, 1e-3) for arm in ("kept", "re-drawn", "continued")]
        plan = Plan(SimpleNamespace(finished=lambda stage: stage.id in done), build)
        plan.arms = {run.arm: [Measured(0.0, 0.0, 0.0, 0.0, 1, 100, 10)] * len(run.stages) for run in runs}
        self.assertEqual(plan.disk(runs), 10 + 3 * 100 + 10)
        done.add(runs[0].stages[0].id)
        self.assertEqual(plan.disk(runs), 3 * 100 + 10)
        done |= {runs[0].last.id, runs[1].last.id}
        self.assertEqual(plan.disk(runs), 3 * 100)  # of the dense model that goes on
        done.add(runs[2].last.id)
        self.assertEqual(plan.disk(runs), 0)


# file, what stands there, what is planted: the tests above must notice
PLANTED = [
    ("study_plan.py", "and not stage.last and not self.work.finished(stage)", "and not stage.last"),
    ("study_plan.py", "evaluations = 1 + -(-stage", "evaluations = -(-stage"),
    ("study_plan.py", "stage.steps * step_s - len(looks) * eval_s", "sum(r['seconds'] for r in steps)"),
    ("study_plan.py", "if r[\"step\"] > UNUSUAL_STEPS] or steps[-1:]", "] or steps[-1:]"),
    ("study_plan.py", "or steps[-1:]", "or steps[:0]"),
    ("study_plan.py", "max(0.0, once_s)", "once_s"),
    ("study_chain.py", "saved = steps if probe else", "saved ="),
]


@unittest.skipIf("PLANTED_SOURCES" in os.environ, "started by itself")
class Planted(unittest.TestCase):
    def test_errors_are_noticed(self):
        study_test.expect_noticed(self, __file__, ["Probe", "Estimates"], PLANTED)


if __name__ == "__main__":
    unittest.main()
