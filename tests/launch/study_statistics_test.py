"""What launch/study_statistics.py and study_measures.py make of numbers: intervals, verdicts, costs to an equal loss.
"""

import json
import math
import os
import sys
import unittest
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(os.environ.get("PLANTED_SOURCES", str(ROOT / "launch")))
import study_file  # noqa: E402
import study_result  # noqa: E402
import study_statistics as statistics  # noqa: E402
from study_measures import MEASURES, by_measure, ratio  # noqa: E402
from study_test import expect_noticed  # noqa: E402


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
        # A gain that is certain and too small is none; one that may be smaller than was claimed does not show it.
        small = statistics.interval([-0.0010, -0.0011, -0.0012])
        self.assertEqual(statistics.verdict(small).word, "supported")
        self.assertEqual(statistics.verdict(small, -0.005).word, "not supported")
        self.assertEqual(statistics.verdict(statistics.interval([0.0, 0.0, 0.0]), -0.005).word, "not supported")
        claim = study_file.Comparison(better="a", than="b", worth=0.005)
        self.assertIn("below 'b' by 0.005 nats", MEASURES["loss"].claim(claim))
        self.assertEqual(MEASURES["loss"].decide(claim, small).word, "not supported")
        about = statistics.interval([-0.0050, -0.0056, -0.0062])
        self.assertEqual((statistics.verdict(about).word, statistics.verdict(about, -0.005).word),
                         ("supported", "undecided"))

    # What bounds a ratio from above can support that it is small, and never refute it; the other way round from below.
    def test_verdicts_on_bounds(self):
        small, large = [-0.10, -0.11, -0.12], [0.10, 0.11, 0.12]
        for values, side, word in ((small, statistics.AT_MOST, "supported"), (large, statistics.AT_MOST, "undecided"),
                                   (small, statistics.AT_LEAST, "undecided"),
                                   (large, statistics.AT_LEAST, "not supported"),
                                   (small, statistics.UNKNOWN, "undecided"), (large, statistics.UNKNOWN, "undecided")):
            found = statistics.interval(values, ["", side, ""])
            self.assertEqual((found.side, statistics.verdict(found).word), (side, word))
        self.assertEqual(statistics.interval(small, [statistics.AT_MOST, statistics.AT_LEAST, ""]).side,
                         statistics.UNKNOWN)
        self.assertIn("was not measured", str(statistics.verdict(statistics.interval(large, [statistics.AT_MOST]))))

    def test_seeds_that_would_decide(self):
        open_ = statistics.interval([-0.10, 0.02, -0.04])
        found = statistics.verdict(open_)
        self.assertEqual(found.word, "undecided")
        self.assertLess(statistics.half_width(open_.deviation, found.seeds), -open_.mean)
        self.assertGreaterEqual(statistics.half_width(open_.deviation, found.seeds - 1), -open_.mean)
        self.assertIn(f"about {found.seeds} seeds", str(found))
        self.assertGreater(statistics.verdict(open_, -0.03).seeds, found.seeds)  # the nearer the claim, the more
        self.assertEqual(statistics.verdict(statistics.interval([-0.1])).seeds, 2)
        self.assertIn("more than 1000", str(statistics.verdict(statistics.interval([-1.0, 0.0, 1.0001]))))

    def curve(self, losses, tokens):
        return statistics.Curve(np.array(losses), {"tokens": np.array(tokens, dtype=float)})

    def test_equal_cost_and_equal_loss(self):
        a, b = self.curve([4.0, 3.0, 2.0], [0, 10, 20]), self.curve([4.0, 3.5, 3.0], [0, 20, 40])
        self.assertEqual(statistics.loss_difference(a, b, "tokens"), (2.0 - 3.5, ""))
        self.assertEqual(statistics.cost_ratio(a, b, "tokens"), (math.log(10 / 40), ""))
        charged = a.later({"tokens": 30.0})
        self.assertEqual(statistics.loss_difference(charged, b, "tokens"), (0.0, ""))
        self.assertEqual(statistics.cost_ratio(charged, b, "tokens"), (0.0, ""))
        self.assertEqual(a.to_reach(2.5, "tokens"), (15, True))
        self.assertTrue(math.isnan(a.to_reach(1.0, "tokens")[0]))
        # One that starts below what the other ends at: at once, or for no more than its source and that start.
        low = self.curve([2.5, 2.4, 2.3], [0, 20, 40])
        self.assertEqual(statistics.cost_ratio(low, b, "tokens"), (-math.inf, ""))
        self.assertEqual(ratio(statistics.interval([-math.inf] * 2)), "at once")
        sunk = low.later({"tokens": 60.0})
        self.assertEqual(statistics.cost_ratio(sunk, b, "tokens"), (math.log(60 / 40), statistics.AT_MOST))
        self.assertEqual(statistics.cost_ratio(b, sunk, "tokens"), (math.log(40 / 60), statistics.AT_LEAST))
        self.assertEqual(statistics.cost_ratio(sunk, sunk, "tokens")[1], "")
        self.assertRegex(ratio(statistics.interval(*zip(*[statistics.cost_ratio(sunk, b, "tokens")] * 2))),
                         r"^at most 1\.500 \[")
        self.assertTrue(math.isnan(charged.at("tokens", 5)))


class CommittedOutcome:
    """One seed of an arm in a result.json. What its source took is there in FLOPs alone."""
    def __init__(self, seed):
        curve = seed["curve"]
        self.sunk = statistics.Curve(np.array(curve["loss"]), {
            axis: np.array(curve.get(axis, curve["flops"]), dtype=float) for axis in ("tokens", "flops", "seconds")})
        self.charged = self.sunk.later({"tokens": math.nan, "seconds": math.nan,
                                        "flops": seed["flops_with_source"] - seed["flops"]})

    def curve(self, with_source):
        return self.charged if with_source else self.sunk


# What documents say of the studies that ran is what this code makes of the curves that are kept of them.
class Committed(unittest.TestCase):
    def test_verdicts_and_tables_follow_from_the_curves(self):
        judged = 0
        for path in sorted((ROOT / "docs/studies").glob("*_result.json")):
            result = json.loads(path.read_text())
            table = path.with_name(path.name.replace("_result.json", "_table.md")).read_text()
            known = [c for c in result["comparisons"] if MEASURES[c["by"]].curves and c["verdict"] != "not compared"]
            compare = [study_file.Comparison(**{key: c[key] for key in study_file.Comparison.__dataclass_fields__
                                                if key in c}) for c in known]
            outcomes = {arm: [CommittedOutcome(seed) for seed in of["seeds"]] for arm, of in result["arms"].items()}
            with self.subTest(study=path.name):
                for line in study_result.verdict_lines(SimpleNamespace(compare=compare), outcomes):
                    self.assertIn(line, table)
                for kept, comparison in zip(known, compare, strict=True):
                    found, word = MEASURES[comparison.by].judge(comparison, outcomes)
                    self.assertEqual((kept["verdict"], kept["seeds_to_decide"]),
                                     (word.word if word else "not reached", word.seeds if word else None))
                    if kept["mean"] is not None:
                        np.testing.assert_allclose((kept["mean"], kept["low"], kept["high"]),
                                                   (found.mean, found.low, found.high), rtol=0, atol=1e-9)
                    judged += 1
                rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
                for measure, compared in by_measure(compare):
                    for row in measure.rows(compared, outcomes):
                        known = (0, 1, 2, 4) if row[1] == "tokens" else range(6)
                        self.assertIn([row[i] for i in known], [[r[i] for i in known] for r in rows if len(r) == 6])
        self.assertGreater(judged, 40)


# file, what stands there, what is planted: the tests above must notice
PLANTED = [
    ("study_statistics.py", "stdtrit(pairs - 1,", "stdtrit(pairs,"),
    ("study_statistics.py", "values.std(ddof=1)", "values.std()"),
    ("study_statistics.py", "if difference.low > bound and", "if difference.mean > bound and"),
    ("study_statistics.py", "difference.side not in (AT_MOST, UNKNOWN)", "difference.side != UNKNOWN"),
    ("study_statistics.py", "difference.side not in (AT_LEAST, UNKNOWN)", "difference.side != UNKNOWN"),
    ("study_statistics.py", "return float(x[0]), False", "return float(x[0]), True"),
    ("study_statistics.py", "distance = abs(difference.mean - bound)", "distance = abs(difference.mean)"),
    ("study_measures.py", "return verdict(found, -comparison.worth)", "return verdict(found)"),
    ("study_statistics.py", "amount = min(a.end(axis)", "amount = max(a.end(axis)"),
    ("study_statistics.py", "loss = max(float(a.loss[-1])", "loss = min(float(a.loss[-1])"),
]


@unittest.skipIf("PLANTED_SOURCES" in os.environ, "one planted error at a time")
class Planted(unittest.TestCase):
    def test_errors_are_noticed(self):
        expect_noticed(self, __file__, ["Statistics"], PLANTED)


if __name__ == "__main__":
    unittest.main()
