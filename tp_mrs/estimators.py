"""How much robust loss a layer's worst small weight change costs: pure functions on frozen adversarial images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import DivergenceError

Batch = tuple[Tensor, Tensor]


def robust_loss(model: nn.Module, batches: Sequence[Batch], *, differentiate: bool = True) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of `model` on `batches`; gradients add up in each parameter's `.grad`.

    Micro-batches of any size give the same result but for float error: each is weighted by its number of images.
    """
    count = sum(len(labels) for _, labels in batches)
    total, correct = 0.0, 0
    for images, labels in batches:
        with torch.set_grad_enabled(differentiate):
            logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum") / count
        if differentiate:
            loss.backward()
        total += loss.item()
        correct += int((logits.argmax(dim=1) == labels).sum())
    if not total < float("inf"):
        raise DivergenceError(f"the loss on the attacked images is {total}; are the model's weights finite?")
    return total, correct / count


def first_order(weight: Tensor, gradient: Tensor, epsilon: float) -> float:
    """`ε‖θ‖₂‖∂R/∂θ‖₂`: the largest increase of the linearised loss in the ball of radius ε‖θ‖₂."""
    return epsilon * _norm(weight) * _norm(gradient)


def projected_gradient_ascent(
    model: nn.Module,
    weight: nn.Parameter,
    gradient: Tensor,
    batches: Sequence[Batch],
    *,
    loss: float,
    epsilon: float,
    steps: int,
) -> float:
    """The largest increase of the loss that `steps` steps of normalised-gradient ascent find in the ball.

    The first step goes to the edge of the ball along `gradient`, the gradient at the centre; each further one moves by
    the radius along the new gradient and is projected back. The best loss is kept, so the result is never negative.
    `weight` is as before afterwards, exceptions included.
    """
    origin = weight.detach().clone()
    radius = epsilon * _norm(origin)
    delta, best = torch.zeros_like(origin), loss
    with _only(model, weight):
        try:
            for step in range(steps):
                length = _norm(gradient)
                if length == 0 or radius == 0:
                    break
                delta = _project(delta + gradient * (radius / length), radius)
                with torch.no_grad():
                    weight.copy_(origin + delta)
                weight.grad = None
                reached, _ = robust_loss(model, batches, differentiate=step + 1 < steps)
                best = max(best, reached)
                gradient = weight.grad if weight.grad is not None else gradient
        finally:
            with torch.no_grad():
                weight.copy_(origin)
            weight.grad = None
    return best - loss


@contextmanager
def _only(model: nn.Module, weight: nn.Parameter) -> Iterator[None]:
    """Gradients for one parameter alone, so that backward passes stop at its layer."""
    others = [p for p in model.parameters() if p is not weight and p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _project(delta: Tensor, radius: float) -> Tensor:
    length = _norm(delta)
    return delta if length <= radius else delta * (radius / length)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))
