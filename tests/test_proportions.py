"""Intervals of proportions, by hand and against other implementations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tp_mrs import InputError
from tp_mrs.proportions import chance_of_at_least, paired_difference, wilson


def test_wilson_by_hand() -> None:
    # z = 1.959964, z² = 3.841459; 8 of 10: centre (0.8 + 0.1920729) / 1.3841459 = 0.7167402,
    # half √(0.8 · 0.2 / 10 + 3.841459 / 400) · z / 1.3841459 = 0.2265777
    assert wilson(8, 10) == pytest.approx((0.7167402 - 0.2265777, 0.7167402 + 0.2265777), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((10 / 13.841459, 1.0), abs=1e-6)


@pytest.mark.parametrize(("successes", "trials", "level"), [(0, 1, 0.95), (3, 7, 0.9), (412, 1000, 0.99), (5, 5, 0.8)])
def test_wilson_is_scipys(successes: int, trials: int, level: float) -> None:
    expected = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    assert wilson(successes, trials, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_paired_difference_by_hand() -> None:
    first = np.array([True] * 60 + [True] * 12 + [False] * 4 + [False] * 24)
    second = np.array([True] * 60 + [False] * 12 + [True] * 4 + [False] * 24)
    # p = 13/102, q = 5/102: centre 0.0784314, half 1.959964 · √((18/102 − 0.0784314²) / 102) = 0.0800903
    difference = paired_difference(first, second)
    assert difference == pytest.approx((0.08, 0.0784314 - 0.0800903, 0.0784314 + 0.0800903), abs=1e-6)
    assert str(difference) == "+8.0 points (-0.2 to +15.9)"
    assert paired_difference(second, first) == pytest.approx((-0.08, -difference.high, -difference.low))


def test_intervals_hold_what_they_promise() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        uniform = generator.random(200)
        difference = paired_difference(uniform < 0.6, (uniform > 0.05) & (uniform < 0.62))  # the truth: 0.03
        held += difference.low <= 0.03 <= difference.high
    assert held >= 0.93 * 400


@pytest.mark.parametrize(("more", "fewer"), [(0, 0), (10, 0), (5, 5), (41, 3), (3, 41), (2000, 1900)])
def test_coin_tosses_are_scipys(more: int, fewer: int) -> None:
    expected = stats.binom.sf(more - 1, more + fewer, 0.5)
    assert chance_of_at_least(more, fewer) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("level", [0, 0.2, 1, float("nan")])
def test_a_bad_level(level: float) -> None:
    with pytest.raises(InputError, match="level: expected a number in"):
        wilson(1, 2, level)
