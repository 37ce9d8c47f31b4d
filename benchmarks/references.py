"""What our estimators are held against: RiFT's procedure, and a maximiser that is run until it has converged."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batches = Sequence[tuple[Tensor, Tensor]]


def mean_loss(model: nn.Module, batches: Batches) -> float:
    """Mean cross-entropy."""
    with torch.no_grad():
        total = sum(float(F.cross_entropy(model(images), labels, reduction="sum")) for images, labels in batches)
    return total / sum(len(labels) for _, labels in batches)


def rift(model: nn.Module, layer: str, batches: Batches, *, epsilon: float = 0.1, passes: int = 10) -> float:
    """Module Robust Criticality as RiFT computes it (arXiv 2308.02533, and the settings of its published code).

    A copy of the model, in which only this layer's weight is trained, takes passes of plain gradient ascent over the
    batches, a step of size 1 each. After each pass the weight is projected into the ball of radius ε‖θ‖₂ and the loss
    evaluated; the highest counts.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    weight = copied.get_parameter(f"{layer}.weight").requires_grad_(True)
    origin = weight.detach().clone()
    radius = epsilon * origin.norm()
    optimizer = torch.optim.SGD([weight], lr=1.0, maximize=True)
    before, highest = mean_loss(copied, batches), 0.0
    for _ in range(passes):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(copied(images), labels).backward()
            optimizer.step()
        with torch.no_grad():
            change = weight - origin
            if change.norm() > radius:
                weight.copy_(origin + change * (radius / change.norm()))
        highest = max(highest, mean_loss(copied, batches))
    return highest - before


def converged(
    model: nn.Module, layer: str, batches: Batches, *, epsilon: float = 0.1, steps: int = 20, restarts: int = 2
) -> float:
    """The largest increase of the loss that any of several long ascents finds in the ball.

    One starts at the centre, the others at random points of the sphere; each takes normalised steps over all images,
    of the radius at first and a fifth of it at last, and is projected back; the highest loss of all steps counts.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    weight = copied.get_parameter(f"{layer}.weight").requires_grad_(True)
    origin = weight.detach().clone()
    radius = epsilon * origin.norm()
    before = highest = mean_loss(copied, batches)
    count = sum(len(labels) for _, labels in batches)
    generator = torch.Generator().manual_seed(0)
    for start in range(1 + restarts):
        change = torch.zeros_like(origin)
        if start:
            change = torch.randn(origin.shape, generator=generator).to(origin)
            change *= radius / change.norm()
        for step in range(steps + 1):
            with torch.no_grad():
                weight.copy_(origin + change)
            gradient, reached = torch.zeros_like(origin), 0.0
            for images, labels in batches:
                loss = F.cross_entropy(copied(images), labels, reduction="sum") / count
                gradient += torch.autograd.grad(loss, weight)[0]
                reached += float(loss)
            highest = max(highest, reached)
            stride = radius * (1 - 0.8 * step / steps)
            change = change + gradient * (stride / gradient.norm().clamp_min(1e-30))
            change = change * (radius / change.norm()).clamp(max=1)
    return highest - before
