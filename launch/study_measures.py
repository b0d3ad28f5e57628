"""What a study may compare its arms by. A measure takes a number of each pair of runs, says in words what was claimed
of it, decides, and gives the rows that show it; what is written around them (study_result.py) knows none by name.

claim(comparison)                       the claim as a sentence
judge(comparison, outcomes)             (Interval over the pairs, Verdict; None where nothing could be measured)
rows(comparisons, outcomes)             of table.md: the same whenever a study is done again
timings(comparisons, outcomes)          of timings.md; none where seconds say nothing of it
facts(outcome)                          of one run, for result.json
note                                    what is said below its rows
unreached                               instead of a verdict, where nothing could be measured
curves                                  whether held-out curves show it
"""

import math

from study_statistics import (NOT_SUPPORTED, SUPPORTED, UNDECIDED, UNKNOWN, Verdict, cost_ratio, interval,
                              loss_difference, verdict)

NAMES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training"}
REPRODUCED = ("tokens", "flops")  # the same whenever a study is done again


def nats(found, sign="+"):
    """An interval of losses or of their differences, in words."""
    if not math.isfinite(found.mean):
        return "not reached"
    text = f"{found.mean:{sign}.4f}"
    return f"{text} (one pair)" if found.pairs < 2 else f"{text} [{found.low:{sign}.4f}, {found.high:{sign}.4f}]"


def ratio(found):
    """An interval of logarithms of ratios, in words."""
    if found.mean == -math.inf:
        return "at once"
    if not math.isfinite(found.mean):
        return "not reached"
    if found.side == UNKNOWN:
        return "not known"
    text = f"{found.side} {math.exp(found.mean):.3f}".lstrip()
    if found.pairs < 2:
        return f"{text} (one pair)"
    return f"{text} [{math.exp(found.low):.3f}, {math.exp(found.high):.3f}]"


def over_pairs(comparison, outcomes, function, axis, with_source):
    """Of function(first, second, axis) of the curves of each pair of seeds."""
    return interval(*zip(*(function(a.curve(with_source), b.curve(with_source), axis) for a, b in
                           zip(outcomes[comparison.better], outcomes[comparison.than], strict=True)), strict=True))


def curve_rows(comparisons, outcomes, axes):
    """Each pair of arms that is compared, by everything that its curves say."""
    yield ["first arm, second arm", "at equal", "loss, first - second, nats", "sources charged",
           "cost to an equal loss, first / second", "sources charged"]
    pairs = {(comparison.better, comparison.than): comparison for comparison in comparisons}
    for comparison in pairs.values():
        for axis in axes:
            cells = [words(over_pairs(comparison, outcomes, function, axis, charged))
                     for words, function in ((nats, loss_difference), (ratio, cost_ratio))
                     for charged in (False, True)]
            yield [f"{comparison.better}, {comparison.than}", NAMES[axis], *cells]


class OfCurves:
    """A number of two held-out curves against what was spent."""
    curves = True
    unreached = "not reached: the two never come to one loss"
    note = ("Where two arms spent unequally, the dearer one is read before its end, at a learning rate that was still "
            "high; of ratios the mean is geometric. An arm that stood at that loss at its first evaluation came to "
            "it at once or, with its source charged whole, for at most what is given; at least, where it is the "
            "second.")

    def judge(self, comparison, outcomes):
        found = over_pairs(comparison, outcomes, self.number, comparison.at, comparison.with_source)
        return found, None if math.isnan(found.mean) else self.decide(comparison, found)

    @staticmethod
    def rows(comparisons, outcomes):
        return curve_rows(comparisons, outcomes, REPRODUCED)

    @staticmethod
    def timings(comparisons, outcomes):
        return curve_rows(comparisons, outcomes, ("seconds",))

    @staticmethod
    def facts(outcome):
        return {}  # the curve is there in any case

    @staticmethod
    def charged(comparison):
        return ", their sources charged" if comparison.with_source else ""


class Loss(OfCurves):
    number = staticmethod(loss_difference)

    def claim(self, comparison):
        least = f" by {comparison.worth:g} nats" if comparison.worth else ""
        return (f"'{comparison.better}' ends below '{comparison.than}'{least} at equal {NAMES[comparison.at]}"
                f"{self.charged(comparison)}")

    def decide(self, comparison, found):
        return verdict(found, -comparison.worth)


class Cost(OfCurves):
    number = staticmethod(cost_ratio)

    def claim(self, comparison):
        return (f"'{comparison.better}' comes to the loss of '{comparison.than}' for {comparison.most:g} of its "
                f"{NAMES[comparison.at]}{self.charged(comparison)}")

    def decide(self, comparison, found):
        return verdict(found, math.log(comparison.most))


class Mates:
    """Whether the loss of a sequence depends on the others of its batch (study_mates.py): counted, to the bit. One
    sequence that changes refutes that none does, and shows that some do; so no interval decides.
    """
    curves = False
    unreached = "not measured: no training had two steps"
    note = ("Each sequence was computed twice at one place of a batch, by the same weights, beside two sets of other "
            "sequences; it has changed where the two losses differ in any bit.")

    def claim(self, comparison):
        return (f"in '{comparison.better}' the other sequences of a batch change no sequence's loss by a bit, in "
                f"'{comparison.than}' they do")

    def judge(self, comparison, outcomes):
        first, second = ([outcome.changes() for outcome in outcomes[arm]]
                         for arm in (comparison.better, comparison.than))
        found = interval([a.share - b.share for a, b in zip(first, second, strict=True)])
        if not math.isfinite(found.mean):
            return found, None
        if any(a.changed for a in first):
            return found, Verdict(NOT_SUPPORTED)
        if any(b.changed for b in second):
            return found, Verdict(SUPPORTED)
        return found, Verdict(UNDECIDED, note=f"'{comparison.than}' changed none either")

    @staticmethod
    def rows(comparisons, outcomes):
        yield ["arm", "sequences beside two sets of others", "changed", "by seed", "largest change, nats"]
        for arm in dict.fromkeys(arm for c in comparisons for arm in (c.better, c.than)):
            found = [outcome.changes() for outcome in outcomes[arm]]
            yield [arm, sum(f.sequences for f in found), sum(f.changed for f in found),
                   ", ".join(str(f.changed) for f in found), f"{max(f.largest for f in found):.3g}"]

    @staticmethod
    def timings(comparisons, outcomes):
        return ()

    @staticmethod
    def facts(outcome):
        found = outcome.changes()
        return {"sequences": found.sequences, "changed": found.changed, "largest_change": found.largest}


MEASURES = {"loss": Loss(), "cost": Cost(), "mates": Mates()}


def by_measure(comparisons):
    """(measure, its comparisons), those that give the same rows together."""
    groups = {}
    for comparison in comparisons:
        measure = MEASURES[comparison.by]
        groups.setdefault(measure.rows, (measure, []))[1].append(comparison)
    return list(groups.values())
