"""The picture of a study: every arm is told apart, and what tells them apart covers nothing."""

import itertools
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "launch"))
import study_file  # noqa: E402
import study_picture  # noqa: E402
from run_curves import STYLE  # noqa: E402
from study_statistics import Curve  # noqa: E402

plt = study_picture.plt


def outcomes_of(arms, seeds=3, spread=0.08):
    """Curves that fall from 5.6 to what each arm ends at, as those of fine-tuning do, with seeds that lie apart."""
    found = {}
    for i, arm in enumerate(arms):
        found[arm] = []
        for seed in range(seeds):
            x = np.linspace(0, 115200, 7)
            loss = 4.1 + 1.3 * i / len(arms) + (1.5 - 1.3 * i / len(arms)) * np.exp(-4 * x / x[-1])
            curve = Curve(loss + spread * (seed - 1) * (1 + 0.3 * i), {"tokens": x, "flops": x * 8e6 * (1 - 0.06 * i)})
            charged = curve.later({"tokens": 5e5, "flops": 4.8e12})
            found[arm].append(SimpleNamespace(curve=lambda with_source, a=curve, b=charged: b if with_source else a))
    return found


def study_of(arms):
    return SimpleNamespace(name="a", size="micro", compare=[SimpleNamespace(better=arms[0], than=arms[-1])])


class Picture(unittest.TestCase):
    def figure(self, arms, **options):
        with plt.rc_context(STYLE):
            figure = study_picture.figure_of(study_of(arms), outcomes_of(arms, **options))
            self.addCleanup(plt.close, figure)
            figure.draw_without_rendering()
        return figure

    def legends(self, figure):
        return [legend for holder in (figure, *figure.axes)
                for legend in (holder.legends if holder is figure else [holder.get_legend()]) if legend]

    def drawn(self, figure):
        """Points of every line and band, straight between those that were computed, as they lie in the picture."""
        for ax in figure.axes:
            paths = [line.get_path() for line in ax.lines] + [path for c in ax.collections for path in c.get_paths()]
            for path in paths:
                yield ax.transData.transform(path.interpolated(50).vertices)

    def check(self, figure, arms):
        whole = figure.bbox
        texts = [text.get_text() for legend in self.legends(figure) for text in legend.get_texts()]
        self.assertEqual(texts, list(arms))
        for legend in self.legends(figure):
            box = legend.get_window_extent()
            self.assertTrue(whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1,
                            "the legend does not fit the picture")
            for points in self.drawn(figure):
                self.assertFalse(any(box.contains(*point) for point in points), "the legend lies over what is drawn")
            for ax in figure.axes:
                self.assertFalse(box.overlaps(ax.get_tightbbox()), "the legend lies over an axis")
        styles = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines
                  if not line.get_label().startswith("_")]
        self.assertEqual(len(set(styles)), len(arms), styles)

    def test_the_legend_covers_nothing(self):
        for seeds in (1, 2, 3, 5):
            with self.subTest(seeds=seeds):
                arms = ("all", "experts frozen", "experts alone", "router alone")
                self.check(self.figure(arms, seeds=seeds), arms)

    # Their number and the length of their names are those that must fit.
    def test_the_arms_of_every_shipped_study_are_told_apart(self):
        for name in study_file.names():
            with self.subTest(name):
                arms = list(study_file.read_study(study_file.find(name), "micro").arms)
                self.check(self.figure(arms), arms)

    # Where verdicts are taken.
    def test_intervals_are_seen_whole_at_the_end(self):
        ax = self.figure(("all", "router alone"), spread=0.5).axes[0]
        points = np.concatenate([path.vertices for band in ax.collections for path in band.get_paths()])
        self.assertEqual(len(ax.collections), 2)
        last = points[points[:, 0] == points[:, 0].max(), 1]
        low, high = ax.get_ylim()
        self.assertLess(low, points[:, 1].min())
        self.assertGreater(high, last.max())

    # Seeds lie ten times farther apart than arms do; and the arm's runs are a third as long, which ends between two
    # evaluations of the other's: the table compares them there.
    def test_differences_are_those_within_pairs(self):
        x, found = np.linspace(0, 1200, 4), {}
        for arm, points, gain in (("one", x / 3, 0.01), ("$other$", np.array([0, 300, 900, 1200]), 0.0)):
            found[arm] = [SimpleNamespace(curve=lambda _, c=Curve(
                5 - points / 1000 + 0.1 * seed - gain * (1 + 0.1 * seed), {"tokens": points, "flops": points}): c)
                for seed in range(3)]
        with plt.rc_context(STYLE):
            figure = study_picture.figure_of(study_of(("one", "$other$")), found)
        self.addCleanup(plt.close, figure)
        ax = figure.axes[-1]
        zero, line = ax.lines
        self.assertEqual(list(zero.get_ydata()), [0, 0])
        np.testing.assert_allclose(line.get_xdata(), [0, 400 / 3, 800 / 3, 300, 400])
        np.testing.assert_allclose(line.get_ydata(), [-0.011] * 5, atol=1e-12)
        band = ax.collections[0].get_paths()[0].vertices[:, 1]
        self.assertAlmostEqual(band.max() - band.min(), 2 * 4.30265 * 0.001 / np.sqrt(3), places=6)
        self.assertIn(r"\$other\$", ax.get_ylabel())

    def test_of_many_arms_the_lines_are_seen(self):
        arms = [f"arm {i}" for i in range(study_picture.MOST_BANDED + 1)]
        found = outcomes_of(arms, spread=0.01)
        for outcome in found["arm 0"]:   # far above all others
            far = outcome.curve(False)
            outcome.curve = lambda _, c=Curve(far.loss + 40, far.spent): c
        with plt.rc_context(STYLE):
            figure = study_picture.figure_of(study_of(arms[1:]), found)
        self.addCleanup(plt.close, figure)
        self.assertFalse(any(ax.collections for ax in figure.axes))
        beside = figure.axes[-1]
        ends = {line.get_label(): line.get_ydata()[-1] for line in beside.lines}
        low, high = beside.get_ylim()
        self.assertGreater(ends["arm 0"], high)
        self.assertTrue(all(low <= end <= high for arm, end in ends.items() if arm != "arm 0"), ends)
        self.assertEqual(len(ends), len(arms))

    def test_the_file_is_the_same_again(self):
        study, files = study_of(("one", "$two$")), []
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(2):
                files.append(study_picture.draw_curves(Path(folder), study, outcomes_of(("one", "$two$"))).read_bytes())
        self.assertTrue(all(a == b for a, b in itertools.pairwise(files)))
        self.assertTrue(files[0].startswith(b"\x89PNG"))


if __name__ == "__main__":
    unittest.main()
