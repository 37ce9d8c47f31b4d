"""The references that estimators are measured against, on a network with a closed form."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.references import converged, rift
from tests.conftest import small_cnn, unchanged
from tests.test_estimators import TwoLayers, one_pixel, softplus


def test_rift_by_hand() -> None:
    # Logits (z, 0) with z = b·a·x, label 0: ∂R/∂a = -σ(-z)·b·x. Plain ascent moves a down by it, ten times at most.
    a, b, x = 2.0, 3.0, 0.5
    value = a
    for _ in range(10):
        slope = 1 / (1 + math.exp(value * b * x))
        value = max(value - slope * b * x, 0.9 * a)
    assert value == 0.9 * a  # it reaches the edge of the ball
    expected = softplus(-value * b * x) - softplus(-a * b * x)
    assert rift(TwoLayers(a, b), "first", one_pixel(x)) == pytest.approx(expected, rel=1e-5)


def test_rift_stays_short_of_the_edge_where_gradients_are_small() -> None:
    a, b, x = 8.0, 3.0, 0.5  # σ(-12) = 6e-6
    model = TwoLayers(a, b)
    assert rift(model, "first", one_pixel(x)) < 0.01 * converged(model, "first", one_pixel(x))


def test_converged_by_hand() -> None:
    a, b, x, epsilon = 2.0, 3.0, 0.5, 0.1
    worst = (b - math.sqrt(2) * epsilon * b) * a * x
    expected = softplus(-worst) - softplus(-a * b * x)
    assert converged(TwoLayers(a, b), "second", one_pixel(x)) == pytest.approx(expected, rel=1e-4)


def test_references_leave_the_model_alone() -> None:
    model, batch = small_cnn().eval(), [(torch.rand(4, 3, 8, 8), torch.arange(4))]
    with unchanged(model):
        low, high = rift(model, "3", batch, passes=2), converged(model, "3", batch, steps=5, restarts=1)
    assert 0 < low < 2 * high
