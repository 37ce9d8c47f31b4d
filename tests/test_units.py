"""Sensitivities of single units: what goes together when one channel of a group is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
import torchattacks
from torch import nn

from tests.conftest import image_batches, small_cnn, small_resnet
from tp_mrs import measure_sensitivity
from tp_mrs.measuring import measure
from tp_mrs.pruning import build_pruner, prunable_groups, rooted_groups


def test_units_by_hand() -> None:
    """Two linear layers; unit u has row u of the first and column u of the second."""
    torch.manual_seed(0)
    layers = nn.Linear(12, 3), nn.Linear(3, 2)
    model = nn.Sequential(nn.Flatten(), *layers)
    data = [(torch.rand(4, 3, 2, 2), torch.randint(2, (4,)))]
    result = measure_sensitivity(model, data, torchattacks.VANILA, example_inputs=data[0][0][:1], epsilon=0.2)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    weights, gradients = zip(*((layer.weight.detach(), layer.weight.grad) for layer in layers), strict=True)
    first, second = ((w * g).square() for w, g in zip(weights, gradients, strict=True) if g is not None)
    expected = 0.2 * (first.sum(1) + second.sum(0)).sqrt()
    assert result.units["1"] == pytest.approx(expected.tolist(), rel=1e-4)


class Grouped(nn.Module):
    """Grouped and depthwise convolutions between plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1, groups=4),
            nn.ReLU(),
            nn.Conv2d(12, 6, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.body(images)
        return logits


@pytest.mark.parametrize(
    ("make", "side"),
    [
        (small_resnet, 32),
        (Grouped, 16),
        (lambda: timm.create_model("mobilevit_xxs", num_classes=4), 64),
        (lambda: timm.create_model("densenet121", num_classes=4, growth_rate=4, block_config=(2, 2)), 32),
    ],
)
def test_units_are_what_torch_pruning_would_take_with_each(make: Callable[[], nn.Module], side: int) -> None:
    """The weights of each group of one unit, one slice after the other."""
    torch.manual_seed(0)
    model = make().eval()
    data = image_batches(1, 4, side)
    example = data[0][0][:1]
    measurement = measure(model, data, torchattacks.VANILA, epsilon=1.0)
    found = measurement.sensitivity(prunable_groups(model, example)).units
    pruner = build_pruner(model, example)
    names = {module: name for name, module in model.named_modules()}
    for group in rooted_groups(pruner):
        for unit in {0, group.units // 2, group.units - 1}:
            total = 0.0
            for dependency, channels in group.of(pruner, [unit]):
                layer = dependency.target.module
                if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                    continue
                square = (layer.weight.detach() * measurement.gradients[f"{names[layer]}.weight"]).double().square()
                for channel in channels:
                    if pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                        total += float(square[channel].sum())
                    else:
                        groups = getattr(layer, "groups", 1)
                        rows = square.reshape(groups, -1, *square.shape[1:])
                        total += float(rows[channel // square.shape[1], :, channel % square.shape[1]].sum())
            assert found[names[group.root]][unit] == pytest.approx(math.sqrt(total), rel=1e-4, abs=1e-12)


def test_units_follow_the_estimator() -> None:
    """A layer's part in its units is as large as its own sensitivity says."""
    model, data = small_cnn().eval(), image_batches(2, 8, 16)
    groups = prunable_groups(model, data[0][0][:1])
    one, other = (
        measure(model, data, torchattacks.VANILA, estimator=estimator) for estimator in ("first_order", "pga")
    )
    scaled = replace(one, shares=other.shares).sensitivity(groups)
    assert other.sensitivity(groups).units == scaled.units
    assert one.sensitivity(groups).units != scaled.units
