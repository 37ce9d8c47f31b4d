"""recalibrate: BatchNorm's statistics become those of the data, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import Batches, small_cnn, unchanged
from tp_mrs import InputError, recalibrate


def test_statistics_by_hand(batches: Batches) -> None:
    network = small_cnn()
    with unchanged(network, weights=False):
        assert recalibrate(network, batches) is network
    model: Any = network
    outputs = [model[0](images) for images, _ in batches]  # what the only BatchNorm layer sees
    means = torch.stack([output.mean(dim=(0, 2, 3)) for output in outputs])
    variances = torch.stack([output.var(dim=(0, 2, 3)) for output in outputs])
    torch.testing.assert_close(model[1].running_mean, means.mean(dim=0))
    torch.testing.assert_close(model[1].running_var, variances.mean(dim=0))
    assert model[1].momentum == 0.1


def test_only_statistics_change(batches: Batches) -> None:
    model = small_cnn()
    before = copy.deepcopy(model.state_dict())
    recalibrate(model, batches, max_batches=1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_a_model_without_batchnorm_is_left_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    assert recalibrate(model, []) is model


def _pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1), (5, 1, 1)])
def test_single_images_go_with_their_neighbours(sizes: tuple[int, ...]) -> None:
    images, models = torch.rand(7, 3, 8, 8)[: sum(sizes)], (_pooled(), _pooled())
    models[1].load_state_dict(models[0].state_dict())
    recalibrate(models[0], [(part, torch.zeros(len(part)).long()) for part in images.split(sizes)])
    recalibrate(models[1], [(images, torch.zeros(len(images)).long())])
    for ours, theirs in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_single_image_says_nothing_of_a_single_value() -> None:
    model: Any = _pooled()
    images = torch.rand(1, 3, 8, 8)
    with unchanged(model), pytest.raises(InputError, match="data: BatchNorm has no statistics of a single value"):
        recalibrate(model, [(images, torch.tensor([0]))])
    assert model[2].momentum == 0.1


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "data: it yielded no batch"), ([(torch.full((2, 3, 32, 32), 2.0), torch.tensor([0, 1]))], "images")],
)
def test_bad_data_changes_nothing(data: Any, message: str) -> None:
    model = small_cnn()
    with unchanged(model), pytest.raises(InputError, match=message):
        recalibrate(model, data)
