"""Paired comparisons: what the seeds of a study say of a claim, and how many more would decide it.

A difference is taken within a pair (one seed: the same order of the data, the same dense source, the same held-out
sequences), so that what all arms of a seed share falls out. Its mean over n pairs has the interval
mean +- t s / sqrt(n), t the 97.5 % point of Student's distribution with n - 1 degrees of freedom.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit  # Student's quantile; scipy.stats takes a second to load

LEVEL = 0.95
# Of `interval`, for who reads its numbers.
METHOD = ("mean +- t s / sqrt(n) over the n seeds, s the deviation of their values with n - 1, t the 97.5 % point of "
          "Student's distribution with n - 1 degrees of freedom; differences within pairs of one seed; of ratios their "
          "logarithms")
MOST_SEEDS = 1000  # that are worth naming

AT_MOST, AT_LEAST, UNKNOWN = "at most", "at least", "unknown"
SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float    # -inf and inf of a single pair
    high: float
    deviation: float  # of one pair; nan of a single one
    pairs: int
    side: str = ""    # AT_MOST, AT_LEAST: the values bound what was asked for; UNKNOWN: not even that


def half_width(deviation, pairs):
    return float(stdtrit(pairs - 1, 0.5 + LEVEL / 2)) * deviation / math.sqrt(pairs)


def interval(values, sides=()):
    """Of the mean of `values`, one for each pair; `sides`: which of them bound what they stand for."""
    values, sides = np.asarray(values, dtype=float), set(sides) - {""}
    side = "" if not sides else sides.pop() if len(sides) == 1 else UNKNOWN
    mean = float(values.mean())
    if math.isinf(mean):
        return Interval(mean, mean, mean, 0.0, len(values), side)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf, math.nan, len(values), side)
    deviation = float(values.std(ddof=1))
    half = half_width(deviation, len(values))
    return Interval(mean, mean - half, mean + half, deviation, len(values), side)


@dataclass(frozen=True)
class Verdict:
    word: str
    seeds: int | None = None  # undecided: about as many in all would decide; none where more than MOST_SEEDS would not
    note: str = ""            # undecided: what is said instead, where more seeds are not what it takes

    def __str__(self):
        if self.word != UNDECIDED:
            return self.word
        if self.note:
            return f"{self.word} ({self.note})"
        return f"{self.word} (needs {f'about {self.seeds}' if self.seeds else f'more than {MOST_SEEDS}'} seeds)"


def verdict(difference, bound=0.0):
    """On the claim that `difference` is below `bound`: supported where the whole interval is, not supported where the
    whole of it is above. What is only known to be at most something can support the claim, and never refute it."""
    if difference.pairs >= 2:
        if difference.low > bound and difference.side not in (AT_MOST, UNKNOWN):
            return Verdict(NOT_SUPPORTED)
        if difference.high < bound and difference.side not in (AT_LEAST, UNKNOWN):
            return Verdict(SUPPORTED)
    if difference.side:
        return Verdict(UNDECIDED, note="one of the two stood below that loss at its first evaluation: when it, or its "
                       "source, had come there was not measured")
    return Verdict(UNDECIDED, seeds_to_decide(difference, bound))


def seeds_to_decide(difference, bound):
    """How many pairs would, should mean and deviation stay what they are."""
    if difference.pairs < 2:
        return 2
    distance = abs(difference.mean - bound)
    for pairs in range(difference.pairs + 1, MOST_SEEDS + 1):
        if half_width(difference.deviation, pairs) < distance:
            return pairs
    return None


@dataclass(frozen=True)
class Curve:
    """Held-out losses of one run against what had been spent; each of `spent` rises."""
    loss: np.ndarray
    spent: dict  # "tokens", "flops", "seconds": np.ndarray

    def later(self, before):
        """The same curve after what its source had spent: {"tokens": ..., ...}."""
        return Curve(self.loss, {axis: values + before[axis] for axis, values in self.spent.items()})

    def end(self, axis):
        return float(self.spent[axis][-1])

    def at(self, axis, amount):
        """The loss where so much was spent; nan before the first evaluation."""
        x = self.spent[axis]
        return float(np.interp(amount, x, self.loss)) if x[0] <= amount <= x[-1] else math.nan

    def to_reach(self, loss, axis):
        """What was spent when the loss first came to `loss`, straight between evaluations, nan when it never did; and
        whether that is known. Where the first evaluation lies below, it was there already: a source that is charged
        whole may have come by that loss long before its end."""
        below = np.nonzero(self.loss <= loss)[0]
        if not len(below):
            return math.nan, True
        i, x = int(below[0]), self.spent[axis]
        if i == 0:
            return float(x[0]), False
        share = (self.loss[i - 1] - loss) / (self.loss[i - 1] - self.loss[i])
        return float(x[i - 1] + share * (x[i] - x[i - 1])), True


def loss_difference(a, b, axis):
    """Loss of a minus that of b where both had spent what the cheaper of them spent in all; known, or nan."""
    amount = min(a.end(axis), b.end(axis))
    return a.at(axis, amount) - b.at(axis, amount), ""


def cost_ratio(a, b, axis):
    """ln of what a spends to come to the loss that both reach, over what b spends (logarithms have the mean), and which
    side of that the ratio lies on where one of the two is not known."""
    loss = max(float(a.loss[-1]), float(b.loss[-1]))
    (spent_a, known_a), (spent_b, known_b) = a.to_reach(loss, axis), b.to_reach(loss, axis)
    if spent_a == 0 and spent_b > 0 and known_b:
        return -math.inf, ""  # at once: nothing is charged before its first evaluation
    side = "" if known_a and known_b else AT_MOST if known_b else AT_LEAST if known_a else UNKNOWN
    return (math.log(spent_a / spent_b) if spent_a > 0 and spent_b > 0 else math.nan), side
