"""What launch/study_plan.py foretells, of numbers made by hand: a probe, seconds, disk, and the time left."""

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
from study_plan import Clock, Measured, Plan, measure  # noqa: E402
from study_work import newest_bytes  # noqa: E402


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
            lines = [{"step": step, "seconds": s, "flops": 1e6 * (10 - step), "flops_teacher": 5e5, "ranks": 2}
                     for step, s in seconds.items()]
            lines += [{"kind": "eval", "step": 0, "seconds": s} for s in looks]
            (Path(folder) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            record = {"wall_s": wall_s, "checkpoint_bytes": 7}
            work = SimpleNamespace(record=lambda _: record, run_dir=lambda _: Path(folder))
            return measure(work, stage or builder().probes()[0].last)

    # Two slow steps are start-up, not the pace; so is what neither steps nor evaluations took.
    def test_a_step_is_a_later_one(self):
        found = self.measured({1: 4.0, 2: 1.5, 3: 0.5, 4: 0.25, 5: 0.5}, [0.75, 1.0, 0.75], 15.0)
        self.assertEqual((found.step_s, found.eval_s, found.once_s), (0.5, 0.75, 15.0 - 5 * 0.5 - 3 * 0.75))
        # What the arm computes as it trains, frozen parts left out: the median of steps 3 to 5, of both ranks.
        self.assertEqual((found.step_flops, found.checkpoint_bytes, found.model_bytes), (2 * (6e6 + 5e5), 7, 0))

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


class Checkpoints(unittest.TestCase):
    # What an interrupted save left lies beside them, and its name comes behind theirs.
    def test_bytes_are_of_the_newest_complete_one(self):
        with tempfile.TemporaryDirectory() as folder:
            self.assertEqual(newest_bytes(Path(folder)), 0)
            for name, size in (("step_00000008", 1), ("step_00000010", 20), ("step_100000000", 300),
                               ("step_100000000.aside", 4000), ("step_00000012.tmp", 50000)):
                (Path(folder) / name).mkdir()
                (Path(folder) / name / "weights").write_bytes(b"0" * size)
            self.assertEqual(newest_bytes(Path(folder)), 300)


class Estimates(unittest.TestCase):
    # Six evaluations: before the first step and behind each fourth.
    def test_estimates(self):
        run = builder().run("kept", 1, 1e-3)
        measured = Measured(2.0, 0.5, 5.0, 2048 * 100.0, 1, 1)
        self.assertAlmostEqual(measured.seconds(run.last), 5.0 + 20 * 2.0 + 6 * 0.5)
        self.assertAlmostEqual(measured.flops(run.last), 20 * 2048 * 100.0)
        self.assertAlmostEqual(Measured(0.0, 0.0, 3.0, 0.0, 0, 1).seconds(run.stages[1]), 3.0)  # an upcycle

    # Three checkpoints of one run and its mixture, and the source; what lies there takes no more place.
    def test_disk_is_asked_for_what_is_to_come(self):
        build, done = builder(), set()
        runs = [build.run(arm, 1, 1e-3) for arm in ("kept", "re-drawn", "continued")]
        plan = Plan(SimpleNamespace(finished=lambda stage: stage.id in done), build)
        plan.arms = {run.arm: [Measured(0.0, 0.0, 0.0, 0.0, 100, 10)] * len(run.stages) for run in runs}
        self.assertEqual(plan.disk(runs), 10 + 3 * 100 + 10)
        done.add(runs[0].stages[0].id)
        self.assertEqual(plan.disk(runs), 3 * 100 + 10)
        done |= {runs[0].last.id, runs[1].last.id}
        self.assertEqual(plan.disk(runs), 3 * 100)  # of the dense model that goes on
        done.add(runs[2].last.id)
        self.assertEqual(plan.disk(runs), 0)


class TimeLeft(unittest.TestCase):
    """Three arms with one source: 40 s and three times 20 s, and two upcycles of 5 s, 110 s in all."""

    def setUp(self):
        build, self.time, self.done = builder(), 1000.0, set()
        self.runs = [build.run(arm, 1, 1e-3) for arm in ("kept", "re-drawn", "continued")]
        self.plan = Plan(SimpleNamespace(finished=lambda stage: stage.id in self.done,
                                         record=lambda stage: {} if stage in self.done else None), build)
        of = {"train": Measured(1.0, 0.0, 0.0, 0.0, 1, 1), "upcycle": Measured(0.0, 0.0, 5.0, 0.0, 1, 1)}
        self.plan.arms = {run.arm: [of[stage.kind] for stage in run.stages] for run in self.runs}
        self.kept, self.drawn, self.continued = self.runs
        self.source = self.kept.stages[0]

    def clock(self):
        return Clock(self.plan, self.runs, lambda: self.time)

    def finish(self, *stages):
        self.done |= {stage.id for stage in stages}

    # The source is trained once; what takes as long as foretold takes from the time left what it took.
    def test_as_foretold(self):
        clock = self.clock()
        self.assertAlmostEqual(clock.left(self.runs, (self.kept, self.source)), 110.0)
        self.time += 30.0
        self.assertAlmostEqual(clock.left(self.runs, (self.kept, self.source), 0.75), 80.0)
        self.time += 10.0
        self.finish(self.source)
        self.assertAlmostEqual(clock.left(self.runs, (self.kept, self.kept.stages[1])), 70.0)

    # Twice as fast: what is ahead is taken to be so as well. A twentieth must be done before that is believed.
    def test_faster_than_foretold(self):
        clock = self.clock()
        clock.left(self.runs, (self.kept, self.source))
        self.time += 1.0
        self.assertAlmostEqual(clock.left(self.runs, (self.kept, self.source), 0.05), 108.0)
        self.time += 9.0
        self.assertAlmostEqual(clock.left(self.runs, (self.kept, self.source), 0.5), 45.0)
        self.time += 10.0
        self.finish(self.source)
        self.assertAlmostEqual(clock.left(self.runs, (self.kept, self.kept.stages[1])), 35.0)
        self.time += 2.5 + 10.0
        self.finish(*self.kept.stages)
        self.assertAlmostEqual(clock.left(self.runs, (self.drawn, self.drawn.stages[1])), 22.5)

    def test_slower_than_foretold(self):
        clock = self.clock()
        clock.left(self.runs, (self.kept, self.source))
        self.time += 60.0
        self.assertAlmostEqual(clock.left(self.runs, (self.kept, self.source), 0.5), 3.0 * 90.0)

    # Nothing of what had been done before was done in no time.
    def test_a_study_that_goes_on(self):
        self.finish(*self.kept.stages)
        clock = self.clock()
        self.assertAlmostEqual(clock.left(self.runs), 45.0)
        self.finish(self.drawn.stages[1])
        self.time += 10.0
        current = (self.drawn, self.drawn.last)
        self.assertAlmostEqual(clock.left(self.runs, current, 0.5), 2.0 * 30.0)  # half of it lay there
        self.time += 20.0
        self.assertAlmostEqual(clock.left(self.runs, current, 1.0), 2.0 * 20.0)
        self.finish(self.drawn.last)
        self.assertAlmostEqual(clock.left(self.runs, (self.continued, self.continued.last)), 2.0 * 20.0)
        self.time += 40.0
        self.finish(self.continued.last)
        self.assertEqual(clock.left(self.runs), 0.0)

    # A run that fails is not done faster than foretold.
    def test_a_run_that_is_left_out(self):
        clock = self.clock()
        clock.left(self.runs, (self.kept, self.source))
        self.time += 40.0
        self.finish(self.source)
        self.assertAlmostEqual(clock.left([self.kept, self.continued], (self.kept, self.kept.stages[1])), 45.0)


# file, what stands there, what is planted: the tests above must notice
PLANTED = [
    ("study_plan.py", "and not stage.last and not self.work.finished(stage)", "and not stage.last"),
    ("study_plan.py", "evaluations = 1 + -(-stage", "evaluations = -(-stage"),
    ("study_plan.py", "stage.steps * step_s - len(looks) * eval_s", "sum(r['seconds'] for r in steps)"),
    ("study_plan.py", "if r[\"step\"] > UNUSUAL_STEPS] or steps[-1:]", "] or steps[-1:]"),
    ("study_plan.py", "or steps[-1:]", "or steps[:0]"),
    ("study_plan.py", "max(0.0, once_s)", "once_s"),
    ("study_plan.py", "seconds * (1 - self.earlier.get(stage, 0.0))", "seconds"),
    ("study_plan.py", "share - self.earlier.setdefault(current[1].id, share)", "share"),
    ("study_plan.py", "and self.plan.work.record(stage) is not None", ""),
    ("study_plan.py", "ahead -= share * seconds", "pass"),
    ("study_plan.py", "spent / behind if", "1.0 if"),
    ("study_plan.py", "0.05 * sum(", "0.0 * sum("),
    ("study_chain.py", "saved = steps if probe else", "saved ="),
]


@unittest.skipIf("PLANTED_SOURCES" in os.environ, "started by itself")
class Planted(unittest.TestCase):
    def test_errors_are_noticed(self):
        study_test.expect_noticed(self, __file__, ["Probe", "Estimates", "TimeLeft"], PLANTED)


if __name__ == "__main__":
    unittest.main()
