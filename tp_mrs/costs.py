"""What the channels of a model cost, and at which price each of them goes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from .architectures import LAYERS
from .counting import count
from .pruning import Group, width
from .uncertainty import Array

_SMALLEST_COST = 1e-12


@dataclass(frozen=True)
class LayerCost:
    """Cost of a layer, `full · (fraction of its inputs kept) · (fraction of its outputs kept)`.

    `outputs` and `inputs`: group → fraction of the layer's channels that each removed unit of the group takes.
    """

    full: float
    outputs: Mapping[str, float]
    inputs: Mapping[str, float]

    def at(self, removed: Mapping[str, int]) -> float:
        """The cost once `removed` units of each group are gone."""
        out = 1 - sum(removed[group] * share for group, share in self.outputs.items())
        into = 1 - sum(removed[group] * share for group, share in self.inputs.items())
        return self.full * max(out, 0.0) * max(into, 0.0)


def prices(losses: Array, cost: float, alpha: float) -> Array:
    """The least λ for which each unit of a group goes, `q · (loss / (q · cost))^α`; q = 1 / units, 2 / units, …, 1.

    Args:
        losses: what losing each unit costs in robustness, ascending, (units,).
        cost: what removing one saves.
        alpha: how much both count; at 0 the same fraction of each group goes, at 1 the least Σ losses for the savings.

    Returns:
        (units,), ascending.
    """
    q = fractions(len(losses))
    found: Array = np.maximum.accumulate(q * (losses / (q * max(cost, _SMALLEST_COST))) ** alpha)
    return found


def least_kept(channels: int, min_keep: float) -> int:
    """So many of a group's channels are this fraction of them, and at least one."""
    return max(1, math.ceil(min_keep * channels - 1e-9))


def fractions(units: int) -> Array:
    """1 / units, 2 / units, …, 1."""
    return np.arange(1, units + 1) / units


def costs_of(model: nn.Module, example_inputs: Tensor, groups: Sequence[Group], measure: str) -> list[LayerCost]:
    """The model's cost, layer by layer, in fractions of the whole; what no layer accounts for stays whatever goes."""
    if measure == "channels":
        total = sum(group.units for group in groups)
        return [LayerCost(group.units / total, {group.name: 1 / group.units}, {}) for group in groups]
    outputs, inputs = _shares(model, groups)
    if measure == "macs":
        layers = [(full, name, name) for full, name in macs_of(model, example_inputs, outputs)]
    else:
        layers = list(_params(model))
    costs = [LayerCost(full, outputs.get(out, {}), inputs.get(into, {})) for full, out, into in layers]
    return [*costs, LayerCost(1 - sum(cost.full for cost in costs), {}, {})]


def macs_of(model: nn.Module, example_inputs: Tensor, layers: Iterable[str]) -> Iterator[tuple[float, str]]:
    """Fraction of the multiply-accumulates, and the layer whose outputs and inputs it shrinks with."""
    total, _, by_module = count(model, example_inputs)
    for name, module in model.named_modules():
        children = list(module.children())
        if any(child in by_module for child in children):
            continue  # counted child by child
        if children:  # counted as a whole, like attention: it shrinks with its first layer
            name = next((layer for layer in layers if layer.startswith(f"{name}.")), "")
        yield by_module.get(module, 0.0) / total, name


def _params(model: nn.Module) -> Iterator[tuple[float, str, str]]:
    """Fraction of the parameters, and the layers whose outputs and inputs it shrinks with."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, LAYERS) and key == "weight"
            yield parameter.numel() / total, name, name if is_matrix else ""


def _shares(
    model: nn.Module, groups: Sequence[Group]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Layer → group → fraction of the layer's output, and of its input channels, that one unit takes away."""
    modules = dict(model.named_modules())
    outputs: dict[str, dict[str, float]] = {}
    inputs: dict[str, dict[str, float]] = {}
    for group in groups:
        for member in group.members:
            channels = width(modules[member.name], "out" if member.side == "both" else member.side)
            if channels:
                side = inputs if member.side == "in" else outputs
                side.setdefault(member.name, {})[group.name] = len(member.channels) // group.units / channels
    return outputs, inputs
