"""Multiply-accumulates and parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn

from tests.conftest import small_resnet, unchanged
from tp_mrs import InputError, allocate, create_model
from tp_mrs.counting import count
from tp_mrs.pruning import prunable_groups

EXAMPLE = torch.rand(2, 3, 32, 32)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 30 * 30, 4, bias=False))
    convolution, linear = 3 * 9 * 8 * 30 * 30, 8 * 30 * 30 * 4
    found = count(model, EXAMPLE)
    assert (found.macs, found.params) == (convolution + linear, 3 * 9 * 8 + 8 * 30 * 30 * 4)
    assert (found.by_module[model[0]], found.by_module[model[2]]) == (convolution, linear)


def test_it_is_torch_prunings_count() -> None:
    model = small_resnet()
    with unchanged(model):
        found = count(model, EXAMPLE)
    assert (found.macs, found.params) == tp.utils.count_ops_and_params(model, EXAMPLE[:1])


@pytest.mark.parametrize("kind", [StdConv2d, Conv2dSame])
def test_derived_layers_count_like_what_they_derive_from(kind: Any) -> None:
    def network(convolution: Any, linear: Any) -> nn.Module:
        return nn.Sequential(convolution(3, 8, 3, padding=1, bias=False), nn.Flatten(), linear(8 * 32 * 32, 4))

    assert count(network(kind, Doubled), EXAMPLE).macs == count(network(nn.Conv2d, nn.Linear), EXAMPLE).macs


def test_nothing_stays_with_torch_pruning() -> None:
    class FailingError(Exception):
        pass

    class Failing(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            raise FailingError

    before = dict(tp.utils.op_counter.MODULES_MAPPING)
    with pytest.raises(FailingError):
        count(nn.Sequential(Failing(3, 4, 3)), EXAMPLE)
    assert ({}, before) == (tp.utils.op_counter.CUSTOM_MODULES_MAPPING, tp.utils.op_counter.MODULES_MAPPING)


def test_a_network_of_standardised_convolutions_meets_its_budget() -> None:
    torch.manual_seed(0)
    model = create_model("nf_regnet_b0", num_classes=4, image_size=32)
    images = torch.rand(1, 3, 32, 32)
    layers = sum(each for module, each in count(model, images).by_module.items() if isinstance(module, ScaledStdConv2d))
    assert layers > 0.5 * count(model, images).macs
    scores = {group.name: 1.0 for group in prunable_groups(model, images)}
    ratios = allocate(model, images, scores, macs=0.5)
    assert 0.1 < sum(ratios.values()) / len(ratios) < 0.6


def test_a_model_that_keeps_activations() -> None:
    model: Any = small_resnet()
    model.last = model.conv1(EXAMPLE)
    with pytest.raises(InputError, match="model: it cannot be copied, which counting takes"):
        count(model, EXAMPLE)
