"""How much robust loss the worst small change of some weights costs: estimators, on frozen adversarial images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import DivergenceError, device_of
from .numerics import Precision, autocast, culprit
from .processes import add_up, add_up_gradients
from .shortcuts import Shortcut, shortcut

Batch = tuple[Tensor, Tensor]

BLOCKS, SMALLEST_BLOCK = 16, 16
"""Into how many blocks images are split, and how many a block has at least."""

SAMPLED_WEIGHTS = 4096
"""So many random weights of a larger layer stand for all where blocks of images are told apart."""


class RobustLoss:
    """R(θ), the mean cross-entropy of a model on frozen adversarial images.

    To tell how a result varies with the images, they are split into blocks; a pass returns each block's share of R, so
    that the sum over all blocks, those of other processes too, is R. The model is run in the mode it is in.

    Args:
        model: gives logits.
        batches: `(images, labels)`; this process's part of them.
        precision: `"bf16"` runs the model under autocast; losses and gradients still add up in float32 or better.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], *, precision: Precision = "fp32") -> None:
        self.model, self.batches, self.blocks, self.precision = model, batches, in_blocks(batches), precision
        self.device = device_of(model)
        self.sizes = torch.tensor([len(labels) for _, labels in self.blocks])
        """Number of images in each block."""
        self.images = int(add_up(self.sizes.sum().to(self.device)))
        """Number of images, on all processes."""
        self.correct = 0
        """How many of them the last pass classified correctly."""
        self._shortcut = Shortcut({})

    def shares(self) -> Tensor:
        """Each block's share of R, (blocks,) in float64, without gradients."""
        with torch.no_grad():
            return self._pass(self.batches)

    def differentiate(self, after_block: Callable[[], None] | None = None) -> Tensor:
        """The same, and the gradient of R in the `.grad` of each parameter that requires one.

        Args:
            after_block: called when a block's gradient has been added, before those of other processes are. Without it,
                whole batches are run, which is faster.
        """
        for parameter in self.model.parameters():
            parameter.grad = None
        shares = self._pass(self.batches) if after_block is None else self._pass(self.blocks, after_block)
        add_up_gradients(self.model)
        return shares

    @contextmanager
    def varying(self, weights: Sequence[nn.Parameter]) -> Iterator[None]:
        """Gradients for these parameters alone; what doesn't depend on them is run once for each batch."""
        chosen = {id(weight) for weight in weights}
        others = [p for p in self.model.parameters() if id(p) not in chosen and p.requires_grad]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            with autocast(self.device, self.precision):
                self._shortcut = shortcut(self.model, self.batches[0][0][:1])
            yield
        finally:
            self._shortcut = Shortcut({})
            for parameter in others:
                parameter.requires_grad_(True)

    def total(self, shares: Tensor) -> float:
        """The sum over the blocks of all processes."""
        return float(add_up(shares.sum().to(self.device)))

    def _pass(self, batches: Sequence[Batch], after_each: Callable[[], None] = lambda: None) -> Tensor:
        found, correct = [], 0
        for index, (images, labels) in enumerate(batches):
            with autocast(self.device, self.precision), self._shortcut.on(index):
                logits = self.model(images)
            losses = F.cross_entropy(logits.float(), labels, reduction="none") / self.images
            if losses.requires_grad:
                losses.sum().backward()
            after_each()
            found.append(losses.detach())
            correct += int((logits.argmax(dim=1) == labels).sum())
        shares = torch.stack([part.double().sum() for part in torch.cat(found).cpu().split(self.sizes.tolist())])
        if not self.total(shares) < float("inf"):
            raise DivergenceError(f"the loss on the attacked images is not finite{self._culprit()}")
        self.correct = int(add_up(torch.tensor(correct, device=self.device)))
        return shares

    def _culprit(self) -> str:
        return next(filter(None, (culprit(self.model, images) for images, _ in self.batches)), "")


def in_blocks(batches: Iterable[Batch]) -> list[Batch]:
    """The same images in the same order, in about `BLOCKS` parts, but of about `SMALLEST_BLOCK` images or more."""
    batches = list(batches)
    size = max(SMALLEST_BLOCK, math.ceil(sum(len(labels) for _, labels in batches) / BLOCKS))
    blocks: list[Batch] = []
    for images, labels in _joined(batches, size):
        parts = math.ceil(len(labels) / size)
        blocks += zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
    return blocks


def _joined(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Join small batches, as long as they are of one shape and together have at most `size` images."""
    waiting: list[Batch] = []
    for images, labels in batches:
        fits = sum(len(own) for _, own in waiting) + len(labels) <= size
        if waiting and not (fits and waiting[0][0].shape[1:] == images.shape[1:]):
            yield _concatenated(waiting)
            waiting = []
        waiting.append((images, labels))
    if waiting:
        yield _concatenated(waiting)


def _concatenated(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def first_order(
    loss: RobustLoss, weights: Mapping[str, nn.Parameter], epsilon: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ε‖θ‖₂‖∂R/∂θ‖₂`, the largest increase of the linearised loss in the ball of radius ε‖θ‖₂, for all layers at once.

    One pass forward and backward. The gradients stay in `.grad`.

    Args:
        loss: of a model whose parameters all require gradients.
        weights: of each layer.
        epsilon: radius, relative to the norm of each weight.

    Returns:
        each block's share of R, (blocks,); and for each layer each block's share of its score, (blocks,) in float64.
        How a score is split between blocks is worked out on `SAMPLED_WEIGHTS` of the layer's weights; the sum over the
        blocks of all processes is exact.

    Raises:
        DivergenceError: the loss or a gradient is not finite.
    """
    sampled = {name: _sample(weight) for name, weight in weights.items()}
    added: dict[str, list[Tensor]] = {name: [_pick(None, sample)] for name, sample in sampled.items()}

    def note() -> None:
        for name, sample in sampled.items():
            added[name].append(_pick(weights[name].grad, sample))

    shares = loss.differentiate(note)
    # None if the forward pass never uses the layer
    lengths = {name: 0.0 if weight.grad is None else norm(weight.grad) for name, weight in weights.items()}
    broken = [name for name, length in lengths.items() if not length < float("inf")]
    if broken:
        raise DivergenceError(
            f"the gradient of {broken[-1]} on the attacked images is not finite, the first one on the way back; "
            "look for a root, a logarithm or a division behind it that meets 0"
        )
    scores = {}
    for name, weight in weights.items():
        length, direction = lengths[name], _pick(weight.grad, sampled[name]).double()
        steps = torch.stack(added[name]).double().diff(dim=0)
        along = (steps @ direction).cpu()
        total = float(direction.square().sum())
        score = epsilon * norm(weight) * length if length else 0.0
        scores[name] = score * (along / total if total else loss.sizes / loss.images)
    return shares, scores


def projected_gradient_ascent(
    loss: RobustLoss,
    weights: Sequence[nn.Parameter],
    gradients: Sequence[Tensor],
    *,
    base: Tensor,
    epsilon: float,
    steps: int,
) -> Tensor:
    """The largest increase of the loss that some steps of normalised-gradient ascent find, moving `weights` together.

    Each weight moves in its own ball of radius ε‖θ‖₂. A step goes to the edge of the ball along the newest gradient,
    the first along `gradients`, those at the centre: the generalised power method, under which no convex loss falls
    (Journée et al., 2010, JMLR 11). Once it has fallen, steps start at the last point instead, and are projected back.
    The best loss is kept, so the result is never negative. The weights are as before afterwards, exceptions included.

    Args:
        loss: of the model that the weights belong to.
        weights: those of one layer, or of the layers of a group.
        gradients: of R, for each weight.
        base: each block's share of R at the centre, (blocks,).
        epsilon: radius, relative to the norm of each weight.
        steps: how often the gradient is taken, less the one at the centre, which is given; each is followed by a loss.

    Returns:
        each block's share of the increase, (blocks,) in float64.
    """
    origins = [weight.detach().clone() for weight in weights]
    radii = [epsilon * norm(origin) for origin in origins]
    deltas = [torch.zeros_like(origin) for origin in origins]
    best, highest, rising = base, loss.total(base), True
    with loss.varying(weights):
        try:
            for step in range(steps):
                for index, (weight, origin, radius) in enumerate(zip(weights, origins, radii, strict=True)):
                    start = torch.zeros_like(origin) if rising else deltas[index]
                    deltas[index] = _moved(start, gradients[index], radius)
                    with torch.no_grad():
                        weight.copy_(origin + deltas[index])
                shares = loss.differentiate() if step + 1 < steps else loss.shares()
                reached = loss.total(shares)
                rising = reached > highest
                if rising:
                    best, highest = shares, reached
                gradients = [
                    old if weight.grad is None else weight.grad for weight, old in zip(weights, gradients, strict=True)
                ]
        finally:
            with torch.no_grad():
                for weight, origin in zip(weights, origins, strict=True):
                    weight.copy_(origin)
                    weight.grad = None
    return best - base


def _moved(delta: Tensor, gradient: Tensor, radius: float) -> Tensor:
    """`delta`, moved by the radius along the gradient and projected back into the ball."""
    length = norm(gradient)
    if length > 0:
        delta = delta + gradient * (radius / length)
    distance = norm(delta)
    return delta if distance <= radius else delta * (radius / distance)


def norm(tensor: Tensor) -> float:
    """The L2 norm of all values; PyTorch's own is off by 1e-4 for millions of them in float32, or slow in float64."""
    largest = float(tensor.detach().abs().max())
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(float((tensor.detach() / largest).square().sum()))


def _sample(weight: Tensor) -> Tensor:
    """Positions of some random values of a tensor, or of all if they are few; the same each time."""
    if weight.numel() <= SAMPLED_WEIGHTS:
        return torch.arange(weight.numel(), device=weight.device)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(weight.numel(), (SAMPLED_WEIGHTS,), generator=generator).to(weight.device)


def _pick(tensor: Tensor | None, positions: Tensor) -> Tensor:
    """The values there; zeros if there is no tensor."""
    if tensor is None:
        return torch.zeros(len(positions), device=positions.device)
    return tensor.detach().reshape(-1)[positions]
