"""launch/report.py over small made-up runs: pictures and page are there, wrong input is told with status 3."""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "launch"))
import report  # noqa: E402
import report_figures  # noqa: E402
import run_curves  # noqa: E402
import run_metrics  # noqa: E402

# The interpreter with matplotlib that `upmoe report` would take.
OWN = ROOT / ".venv" / "bin" / "python"
PYTHON = os.environ.get("UPMOE_PYTHON") or (str(OWN) if OWN.exists() else sys.executable)


def step(i, experts=0):
    record = {"step": i, "tokens": 100 * i, "loss": 8.0 / i, "aux_loss": 0.0, "grad_norm": 1.0, "seconds": 0.5,
              "tokens_per_s": 200.0, "mfu": None, "flops": 1e9}
    if experts:
        record["expert_load"] = [[1.0 / experts] * experts] * 2
    return record


def held_out(i):
    return {"kind": "eval", "step": i, "tokens": 100 * i, "eval_loss": 9.0 / i}


class RunDirectories(unittest.TestCase):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.folder = Path(self.temporary.name)

    def run_dir(self, name, records):
        (self.folder / name).mkdir()
        text = "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records)
        (self.folder / name / "metrics.jsonl").write_text(text, encoding="utf-8")
        return self.folder / name

    def report(self, *arguments):
        return subprocess.run([PYTHON, ROOT / "launch" / "report.py", *map(str, arguments)], capture_output=True,
                              text=True, errors="replace", check=False)

    def refused(self, words, *arguments):
        done = self.report(*arguments)
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertIn(words, done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)


class Report(RunDirectories):
    def test_dense_and_moe(self):
        dense = self.run_dir("dense", [step(1), held_out(1), step(2), step(3), held_out(3)])
        nan = step(2, 4) | {"loss": None}
        moe = self.run_dir("moe", [step(1, 4), nan, step(3, 4), '{"step": 4, "tok'])  # still being written
        done = self.report(dense, moe, "--out", self.folder / "out", "--continued", "--label", "a<b", "--label", "c")
        self.assertEqual(done.returncode, 0, done.stderr)
        page = self.folder / "out" / "report.html"
        self.assertEqual(done.stdout.strip(), str(page))
        text = page.read_text(encoding="utf-8")
        self.assertIn("a&lt;b", text)
        for name in ("overview", "loss", "heldout_loss", "throughput", "expert_load_0", "expert_load_history_0"):
            picture = self.folder / "out" / f"{name}.png"
            self.assertTrue(picture.read_bytes().startswith(b"\x89PNG"), name)

    def test_axes(self):
        run = self.run_dir("run", [step(2) | {"ranks": 2}, step(4) | {"ranks": 2}])
        for axis in ("tokens", "flops", "seconds", "step"):
            self.assertEqual(self.report(run, "--against", axis).returncode, 0)

    def test_a_teachers_forward_is_charged(self):
        folder = self.run_dir("taught", [step(1) | {"ranks": 2}, step(3) | {"ranks": 2, "flops_teacher": 5e8}])
        run = run_metrics.read_run(folder, "x", "#000000")
        self.assertEqual(list(run.x(run.steps, "flops")), [2e9, 2e9 + 2 * 2 * 1.5e9])

    def test_runs_of_one_arm_are_one_line(self):
        runs = []
        for i in range(4):  # arms of two seeds each; what a study left says which
            lifted = [step(k) | {"loss": 8.0 / k + 0.1 * i} for k in (1, 2, 3)]
            runs.append(self.run_dir(f"run{i}", [held_out(1), *lifted, held_out(3)]))
            (runs[-1] / "study.json").write_text(json.dumps({"arm": f"arm {i // 2}", "seed": i % 2 + 1}))
        parsed = report.read_groups(argparse.Namespace(runs=runs, label=None, group="arm", band=None, continued=False,
                                                       against="tokens"))
        self.assertEqual([(g.label, len(g.runs), g.banded) for g in parsed], [("arm 0", 2, True), ("arm 1", 2, True)])
        self.assertEqual([run.label for g in parsed for run in g.runs],
                         ["arm 0, seed 1", "arm 0, seed 2", "arm 1, seed 1", "arm 1, seed 2"])
        for band in ((), ("--band", "ci"), ("--band", "none")):
            done = self.report(*runs, "--group", "arm", *band, "--against", "seconds")
            self.assertEqual(done.returncode, 0, done.stderr)
        labelled = [word for label in ("a", "a", "b", "b") for word in ("--label", label)]
        self.assertEqual(self.report(*runs, "--group", "arm", *labelled).returncode, 0)
        self.assertEqual(self.report(*runs, "--band", "ci").returncode, 2)

    def test_runs_of_one_name_are_told_apart(self):
        for folder in ("x/run", "y/run", "x/other"):
            (self.folder / folder).mkdir(parents=True)
        runs = [self.folder / name for name in ("x/run", "y/run", "x/other")]
        self.assertEqual(report.told_apart(runs, ["a", "b", "c"]), ["a", "b", "c"])
        self.assertEqual(report.told_apart(runs, ["a", "b", "a"]), ["a, run", "b", "a, other"])
        self.assertEqual(report.told_apart(runs, ["a", "a", "b"]), [f"a, {runs[0]}", f"a, {runs[1]}", "b"])
        for run in runs[:2]:
            (run / "study.json").write_text(json.dumps({"arm": "a", "seed": 7}))  # of two sizes
        self.assertEqual(report.told_apart(runs[:2], ["a", "a"]), [f"a, {runs[0]}", f"a, {runs[1]}"])
        self.assertEqual(report.arm_of(runs[0]), "a")
        for odd in ({"arm": ["a"]}, {"arm": 3}, {"arm": ""}, [], "arm"):
            (runs[0] / "study.json").write_text(json.dumps(odd))
            self.assertEqual(report.arm_of(runs[0]), "run")

    def test_lines_of_runs_in_folders_of_one_name_have_names_of_their_own(self):
        for folder in ("a", "b", "b/a"):
            (self.folder / folder).mkdir()
        for asked, names in ((("a/run", "b/run", "a/other"), ["a/run", "b/run", "other"]),
                             (("a/run", "b/a/run"), [f"{self.folder.resolve().name}/a/run", "b/a/run"]),
                             (("a/run", "a/run"), ["run", "run"])):  # one run twice
            runs = [self.folder / name for name in asked]
            for run in {*runs} - {run for run in runs if run.exists()}:
                self.run_dir(run.relative_to(self.folder), [step(1), step(2)])
            groups = report.read_groups(argparse.Namespace(runs=runs, label=None, group="run", band=None,
                                                           continued=False))
            self.assertEqual([group.title for group in groups], names)
            self.assertEqual([group.runs[0].title for group in groups], names)
        self.assertEqual(report.folder_names([Path("/x"), Path("/y/x")]), ["/x", "y/x"])

    # Student's t of two values is 12.7: such an interval would be all that is seen.
    def test_two_runs_are_lines_and_three_an_interval(self):
        def group(count, banded=True):
            runs = [run_metrics.Run(self.folder, f"run {i}", "#000", steps=[step(k) for k in (1, 2, 3)],
                                    evals=[held_out(k) | {"eval_loss": 9.0 / k + i} for k in (1, 3)])
                    for i in range(count)]
            return run_curves.Group("arm", "#000", runs, banded)

        two = run_curves.heldout_line(group(2), "tokens")
        self.assertIsNone(two.low)
        self.assertEqual([list(y) for _, y in two.runs], [[9.0, 3.0], [10.0, 4.0]])
        self.assertEqual(list(two.y), [9.5, 3.5])
        self.assertEqual(group(2).title, "arm (2 runs, thin, and their mean)")
        three = run_curves.heldout_line(group(3), "tokens")
        self.assertTrue((three.high > three.y).all() and not three.runs)
        self.assertEqual(group(3).title, "arm (3 runs, mean and 95 % interval)")
        bare = run_curves.heldout_line(group(2, banded=False), "tokens")
        self.assertEqual((bare.low, bare.runs, group(2, False).title), (None, [], "arm (2 runs, mean)"))
        # One path of the page: the two lines with a gap between them.
        thin = report_figures.part_of(two)["raw"]
        self.assertEqual(thin, {"x": [100.0, 300.0, None, 100.0, 300.0], "y": [9.0, 3.0, None, 10.0, 4.0]})
        marked = [report_figures.curves([group(count)], ["tokens"], run_curves.heldout_line, points=True)[0]["points"]
                  for count in (1, 2, 3)]
        self.assertEqual(marked, [True, False, False])

    def test_names_stand_beside_intervals_not_over_them(self):
        def legend_of(count, draw):
            runs = [run_metrics.Run(
                self.folder, f"run {i}", "#000",
                steps=[step(k) | {"loss": 8.0 / k + i, "tokens_per_s": 90.0 * i + 9} for k in (1, 2, 3)],
                evals=[held_out(k) | {"valid_loss": {"a": 3.0 + i, "b": 1}} for k in (1, 2, 3)]) for i in range(count)]
            figure, ax = report.plt.subplots(figsize=(6, 3.8), layout="constrained")  # as in the overview
            self.addCleanup(report.plt.close, figure)
            draw(ax, [run_curves.Group("arm", "#000000", runs)], "tokens")
            figure.draw_without_rendering()
            axes = ax.get_window_extent().union([ax.get_window_extent(), ax.xaxis.get_tightbbox()])
            return ax.get_legend().get_window_extent(), axes, figure.bbox

        for draw in (run_curves.draw_loss, run_curves.draw_heldout, run_curves.draw_sets, run_curves.draw_throughput):
            names, axes, whole = legend_of(3, draw)
            self.assertLess(names.y1, axes.y0, draw.__name__)
            self.assertGreaterEqual(names.y0, whole.y0 - 1, draw.__name__)
            names, axes, _ = legend_of(1, draw)
            self.assertGreater(names.y0, axes.y0, draw.__name__)

    # Two lines over different points: mean and the interval of two values, t = 12.7062 of one degree of freedom.
    def test_band(self):
        x, mean, half = run_curves.mean_and_half([np.array([0.0, 2.0]), np.array([0.0, 1.0, 2.0])],
                                                 [np.array([1.0, 1.0]), np.array([3.0, 2.0, math.nan])])
        at = int(np.argmin(abs(x - 1.0)))
        self.assertAlmostEqual(mean[0], 2.0)
        self.assertAlmostEqual(mean[at], 1.5, delta=0.01)
        self.assertAlmostEqual(half[0], 12.7062 * math.sqrt(2) / math.sqrt(2), places=3)

    def test_values_at_the_ends_of_lines_cover_neither_each_other_nor_lines_that_go_on(self):
        figure, ax = report.plt.subplots()
        self.addCleanup(report.plt.close, figure)
        ax.set(xlim=(0, 11), ylim=(2, 5))
        ends = [(4.0, 4.0, "#000000"), (4.0, 4.01, "#111111"), (10.0, 3.0, "#222222"), (10.0, 3.001, "#333333")]
        run_curves.label_ends(ax, ends)
        figure.canvas.draw()
        boxes = {text.get_text(): text.get_window_extent() for text in ax.texts}
        self.assertEqual(set(boxes), {"4.000", "4.010", "3.000", "3.001"})
        for i, (words, box) in enumerate(boxes.items()):
            for other in list(boxes.values())[i + 1:]:
                self.assertFalse(box.overlaps(other), f"{words} covers another value")
        for x, y, _ in ends:
            box, point = boxes[f"{y:.3f}"], ax.transData.transform((x, y))
            self.assertTrue(box.x1 < point[0] and box.y1 < point[1] if x < 10 else box.x0 > point[0])

    # A folder's name is bytes, and a formula to matplotlib.
    def test_any_name_of_a_run_is_drawn(self):
        odd = self.run_dir(os.fsdecode(b"run_$x^$ \xff"), [step(1), step(2)])
        hidden = self.run_dir("_hidden", [step(1), held_out(1), step(2)])
        done = self.report(odd, hidden)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertIn("run_$x^$ \ufffd", (odd / "report" / "report.html").read_text(encoding="utf-8"))
        self.assertFalse(run_metrics.title_of("_hidden").startswith("_"))  # or matplotlib leaves it out of the legend

    def test_labels_that_do_not_match_are_usage(self):
        done = self.report(self.run_dir("run", [step(1)]), "--label", "a", "--label", "b")
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("2 labels for 1 runs", done.stderr)

    # In this process, to be quick: what read_run refuses comes out as in test_bad_input.
    def test_metrics_are_not_taken_at_their_word(self):
        wrong = [{"loss": "low"}, {"step": "one"}, {"step": True}, {"step": -1}, {"seconds": [1]}, {"tokens": None},
                 {"tokens_per_s": float("nan")}, {"seconds": 10**400}, {"flops": "many"},
                 {"flops_teacher": "many"}, {"flops_teacher": -1}, {"grad_norm": {}}, {"expert_load": [[1, 2], [3]]},
                 {"expert_load": [[[[1]]]]}, {"expert_load": [[]]}, {"expert_load": 3}, {"expert_load": [["a"]]},
                 {"valid_loss": 3}, {"valid_loss": {"a": "b"}}]
        for i, change in enumerate(wrong):
            run = self.run_dir(f"wrong_{i}", [step(1), step(2) | change])
            with self.assertRaisesRegex(run_metrics.BadInput, "metrics.jsonl:2: not a metrics record", msg=str(change)):
                run_metrics.read_run(run, "x", "#000000")
        for i, line in enumerate(["[1]", "[" * 100000, '"text"', "\x00", "null", ""]):
            run = self.run_dir(f"line_{i}", [step(1), line + "\n", step(2)])
            with self.assertRaisesRegex(run_metrics.BadInput, "metrics.jsonl:2", msg=line[:20]):
                run_metrics.read_run(run, "x", "#000000")
        changed = self.run_dir("changed", [step(1, 4), step(2, 8)])
        with self.assertRaisesRegex(run_metrics.BadInput, "another shape"):
            run_metrics.read_run(changed, "x", "#000000")
        odd = self.run_dir("odd", [step(1), step(2) | {"loss": float("nan"), "mfu": float("inf")}, '{"step": 3, "lo'])
        self.assertEqual(len(run_metrics.read_run(odd, "x", "#000000").steps), 2)

    def test_bad_input(self):
        self.refused("not found", self.folder / "nowhere")
        self.refused("metrics.jsonl:2", self.run_dir("broken", [step(1), "nonsense\n", step(3)]))
        self.refused("no loss", self.run_dir("missing", [{"step": 1, "tokens": 1, "seconds": 1, "tokens_per_s": 1}]))
        self.refused("holds no training step", self.run_dir("empty", []))
        self.refused("no flops or no ranks", self.run_dir("flops", [step(1)]), "--against", "flops")


if __name__ == "__main__":
    unittest.main()
