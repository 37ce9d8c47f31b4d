"""Proportions of images, with intervals: one alone, and two on the same images."""

from __future__ import annotations

from math import exp, lgamma, log, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import check_number

Outcomes = NDArray[np.bool_]


class Difference(NamedTuple):
    """A difference of two proportions, and its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion; sound for few trials and at 0 and 1, too.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    >>> low, high = wilson(5, 10)
    >>> print(f"{low:.4f} {high:.4f}")
    0.2366 0.7634
    """
    z, share = _z(level), successes / trials
    centre = share + z**2 / (2 * trials)
    half = z * sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    low, high = ((centre + side) / (1 + z**2 / trials) for side in (-half, half))
    return max(low, 0.0), min(high, 1.0)


def paired_difference(first: Outcomes, second: Outcomes, level: float = 0.95) -> Difference:
    """Proportion of `first` less that of `second`, with an interval that counts only where they differ.

    Of n pairs, b are true only in `first` and c only in `second`: the mean is (b − c) / n. The interval is Wald's
    after adding one pair to each side, that is with p = (b + 1) / (n + 2) and q = (c + 1) / (n + 2):
    p − q ± z √((p + q − (p − q)²) / (n + 2)).

    Source: Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data", Journal of Educational and Behavioral Statistics 37 (2012).

    Args:
        first, second: (N,), of the same images in the same order.
        level: confidence of the interval.
    """
    only_first, only_second, pairs = int((first & ~second).sum()), int((second & ~first).sum()), len(first)
    p, q = (only_first + 1) / (pairs + 2), (only_second + 1) / (pairs + 2)
    half = _z(level) * sqrt((p + q - (p - q) ** 2) / (pairs + 2))
    return Difference((only_first - only_second) / pairs, max(p - q - half, -1.0), min(p - q + half, 1.0))


def chance_of_at_least(more: int, fewer: int) -> float:
    """Chance that `more + fewer` tosses of a fair coin show at least `more` heads: McNemar's exact test, one-sided.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (1947).

    >>> round(chance_of_at_least(3, 1), 12)
    0.3125
    """
    tosses = more + fewer
    one_sequence = lgamma(tosses + 1) - tosses * log(2)
    return sum(exp(one_sequence - lgamma(k + 1) - lgamma(tosses - k + 1)) for k in range(more, tosses + 1))


def _z(level: float) -> float:
    """How many standard deviations to either side hold the share `level` of a normal distribution."""
    check_number("level", level, low=0.5, high=0.9999)
    return NormalDist().inv_cdf((1 + level) / 2)
