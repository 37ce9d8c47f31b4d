"""Shortcuts past what doesn't depend on the weights that change: results are the same to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import unchanged
from tp_mrs import create_model
from tp_mrs.measuring import measured_weights
from tp_mrs.shortcuts import Shortcut, shortcut

IMAGES = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vary(model: nn.Module, layer: str) -> Shortcut:
    """The shortcut for a model of which this layer's weight alone changes."""
    model.eval().requires_grad_(False)
    model.get_parameter(f"{layer}.weight").requires_grad_(True)
    return shortcut(model, IMAGES[0][:1])


def outputs_and_gradients(model: nn.Module, layer: str, found: Shortcut) -> list[Tensor]:
    """For both batches, the second time round with another weight."""
    weight = model.get_parameter(f"{layer}.weight")
    results, before = [], weight.detach().clone()
    for _ in range(2):
        for batch, images in enumerate(IMAGES):
            with found.on(batch):
                output = model(images)
            results += [output.detach(), *torch.autograd.grad(output.square().sum(), weight)]
        with torch.no_grad():
            weight.mul_(1.1)
    with torch.no_grad():
        weight.copy_(before)
    return results


def same_results(model: nn.Module, layer: str, found: Shortcut) -> bool:
    results = [outputs_and_gradients(model, layer, each) for each in (found, Shortcut({}))]
    return all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("resnet18", {"channels": [8, 8, 16, 16]}), ("mobilevit_xxs", {}), ("vgg11_bn", {}), ("densenet121", {})],
)
def test_outputs_and_gradients_are_the_same(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=4, image_size=32, **arguments)
    layers = list(measured_weights(model)[0])
    for layer in layers[:: max(1, len(layers) // 6)]:
        assert same_results(model, layer, vary(model, layer))


class Net(nn.Module):
    """A stem in two layers, and two branches that are added up in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1))
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.two(F.relu(self.one(images), inplace=True))
        y = self.right(x)
        y += self.left(x)
        pooled: Tensor = self.head(y.mean((2, 3)))
        return pooled


def names_of(model: nn.Module, found: Shortcut) -> dict[str, bool]:
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: needed for module, needed in found.modules.items()}


def test_branches_beside_the_weight_are_kept_and_what_only_they_need_is_not() -> None:
    model = Net()
    found = vary(model, "left")
    # left reads what two gives, and right's output is added; one's is read by two alone
    assert names_of(model, found) == {"one": False, "two": True, "right": True}
    assert names_of(model, vary(model, "one")) == {}
    found = vary(model, "head")
    assert names_of(model, found) == {"one": False, "two": False, "left": True, "right": True}


def test_changes_in_place_do_not_reach_what_is_remembered() -> None:
    model = Net()
    assert same_results(model, "left", vary(model, "left"))


def test_modules_run_once_a_batch() -> None:
    model = Net()
    outer: list[object] = []
    inner: list[object] = []
    found = vary(model, "left")
    model.two.register_forward_hook(lambda *_: outer.append(_))
    model.two[0].register_forward_hook(lambda *_: inner.append(_))
    outputs_and_gradients(model, "left", found)
    assert len(inner) == len(IMAGES)
    assert len(outer) == 2 * len(IMAGES)  # its own hooks are called each time


class Tied(nn.Module):
    """Reads the second layer's weight before the second layer runs, without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.middle = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.conv2d(self.first(images), self.second.weight)
        mapped: Tensor = self.second(self.middle(x))
        return mapped.mean((2, 3))


def test_a_weight_that_other_modules_read_too() -> None:
    model = Tied()
    found = vary(model, "second")
    assert names_of(model, found) == {"first": True}
    assert same_results(model, "second", found)


class Again(nn.Module):
    """Calls one layer twice, and another that returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.pair, self.head = nn.Conv2d(3, 3, 1), Pair(), nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        x, y = self.pair(self.twice(self.twice(images)))
        logits: Tensor = self.head((x + y).mean((2, 3)))
        return logits


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(images), images


def test_layers_called_twice_and_tuples_are_run_anew() -> None:
    model = Again()
    found = vary(model, "head")
    assert names_of(model, found) == {"pair.inner": True}
    assert same_results(model, "head", found)


def test_a_weight_without_effect() -> None:
    model = Net()
    model.requires_grad_(False)
    assert shortcut(model, IMAGES[0]).modules == {}


def test_modules_come_back_after_a_failure() -> None:
    model = Net()
    found = vary(model, "head")
    with unchanged(model), pytest.raises(RuntimeError), found.on(0):
        model(IMAGES[0][:, :1])
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_compiled_models_are_run_as_they_are() -> None:
    model = torch.jit.trace(Tied().eval(), IMAGES[0])
    assert shortcut(nn.Sequential(model), IMAGES[0]).modules == {}
