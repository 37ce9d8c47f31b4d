"""What is lent comes back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torchattacks

from tests.conftest import small_cnn, unchanged
from tp_mrs import InputError, measure_sensitivity
from tp_mrs.borrowing import borrowed, lent


@pytest.mark.parametrize("fails", [False, True])
def test_everything_comes_back(fails: bool) -> None:
    model = small_cnn()
    with unchanged(model):
        try:
            with borrowed(model, seed=7):
                assert not any(module.training for module in model.modules())
                assert all(parameter.grad is None for parameter in model.parameters())
                model.train().requires_grad_(True)
                model(torch.rand(2, 3, 16, 16)).sum().backward()  # moves running statistics, fills gradients
                random.random()
                np.random.rand()
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails


def test_a_seed_repeats_and_no_seed_goes_on() -> None:
    model = small_cnn()
    draws = []
    for seed in (3, 3, 4):
        with borrowed(model, seed=seed):
            draws.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert draws[0] == draws[1] != draws[2]


def test_lent_parameters_collect_no_gradient() -> None:
    model = small_cnn()
    with unchanged(model), lent(model):
        model.eval()
        images = torch.zeros(1, 3, 16, 16, requires_grad=True)
        model(images).sum().backward()
        assert images.grad is not None


def test_inference_mode_is_refused_for_what_needs_gradients() -> None:
    model = small_cnn()
    with unchanged(model), torch.inference_mode(), pytest.raises(InputError, match="call this outside of it"):
        measure_sensitivity(model, [], torchattacks.PGD, example_inputs=torch.zeros(1, 3, 16, 16))
