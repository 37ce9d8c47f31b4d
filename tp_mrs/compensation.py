"""Make up for pruned channels: what layers lose with them is had, as far as can be, from the channels that stay."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
import torch_pruning as tp
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from .architectures import LAYERS, refresh
from .attacks import AttackLike, attacked_batches
from .borrowing import borrowed, still_frozen
from .errors import DivergenceError, InputError, check_seed, device_of, first_input
from .numerics import culprit
from .processes import add_up, failing_together, place
from .pruning import side_of, width

logger = logging.getLogger(__name__)

Moments: TypeAlias = dict[str, Tensor]
"""Name of a layer → (2, channels + 1, channels + 1), float64: Σ x xᵀ over its inputs x with a 1 behind them.

Of one half of each batch, and of the other; x runs over all images and positions.
"""

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)
"""Tried in each layer, in units of the mean variance of the channels that stay; at infinity nothing is made up for."""

WIDEST = 4096
"""Layers of more inputs are left alone: the moments of each would take over a quarter of a gigabyte."""

_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
"""They rescale their weight in each pass, so that adding to it does something else."""


def compensated_step(
    pruner: Any,
    data: Iterable[Any],
    attack: AttackLike,
    *,
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """`pruner.step()` for any pruner of Torch-Pruning, in which layers make up for the channels that they lose.

    What a channel carries can often be had, in part, from others. Before a channel x goes, each layer that reads it
    gets the best linear prediction of x from the channels x' that stay, on attacked images:

        W' ← W' + W B,  bias ← bias + W b,  where ‖x − x' B − b‖² + λ‖B‖² is least

    The same channels go as in `pruner.step()`; nothing is trained, and what is frozen stays so. Then `refresh` the
    model and `recalibrate` it, with `variances=False`.

    Args:
        pruner: a `tp.pruner.BasePruner`, or one of its kinds; its model is pruned in place.
        data: iterable of `(images, labels)`: (N, C, H, W) in [0, 1] and (N,). Take it from the training split.
        attack: a torchattacks attack on the model, or a factory `model -> attack`, such as `torchattacks.VANILA`.
        max_batches: use at most so many batches.
        seed: of the attack's random start.
        progress: show a bar on a terminal.

    Raises:
        InputError: an argument or a batch is unusable; nothing was pruned.
        DivergenceError: the attack, or what layers read, is not finite; nothing was pruned.

    Notes:
        λ is chosen for each layer so that each half of the images predicts the other best; where nothing is predicted,
        layers stay as they are. So do layers with frozen parameters, with weights that others share or that are
        standardised, transposed convolutions, and layers of over 4096 inputs; and no attention logit is made up for. A
        warning says when nothing could be changed.

    Source: least-squares reconstruction after He et al., "Channel Pruning for Accelerating Very Deep Neural Networks",
        arXiv 1707.06168; among channels, as an interpolation, after Chee et al., "Model Preserving Compression for
        Neural Networks", arXiv 2108.00065. Attacked images, and how λ is chosen, are ours.
    """
    if not isinstance(pruner, tp.pruner.BasePruner):
        raise InputError(
            f"pruner: expected a pruner of Torch-Pruning, such as tp.pruner.BasePruner, got {pruner!r:.80}"
        )
    check_seed(seed)
    model = refresh(pruner.model)  # attention pruned by an earlier step cannot run before
    with borrowed(model):
        with failing_together():
            batches = attacked_batches(model, data, attack, max_batches=max_batches, seed=seed, progress=progress)
        with torch.no_grad(), recording(model) as found:
            for images, _ in batches:
                model(images)
        moments = summed(found, device_of(model))
        if not all(moment.isfinite().all() for moment in moments.values()):
            where = next(filter(None, (culprit(model, images) for images, _ in batches)), "")
            raise DivergenceError(f"what layers read of the attacked images is not finite{where}")
    step_with(pruner, moments)


@contextmanager
def recording(model: nn.Module) -> Iterator[Moments]:
    """Inside, each pass forward adds to what this yields."""
    found: Moments = {}

    def note(name: str, arguments: tuple[Any, ...]) -> None:
        rows = _rows(layers[name], first_input(layers[name], arguments).detach())
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        halves, (first, second) = rows.tensor_split(2), found[name][:, -1, -1]
        if first > second:  # of batches of an odd number, the longer half goes to one and the other
            halves = halves[::-1]
        found[name] += torch.stack([half.T @ half for half in halves]).cpu()

    layers = dict(_compensable(model))
    with ExitStack() as hooks:
        for name, layer in layers.items():
            found[name] = torch.zeros(2, width(layer, "in") + 1, width(layer, "in") + 1, dtype=torch.float64)
            hooks.enter_context(layer.register_forward_pre_hook(lambda _, arguments, name=name: note(name, arguments)))
        yield found


def summed(moments: Moments, device: torch.device) -> Moments:
    """Over all processes, which talk from this device."""
    return {name: add_up(moment.to(device)).cpu() if place()[1] > 1 else moment for name, moment in moments.items()}


def _compensable(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers by name whose outputs read several inputs each, with a weight of their own."""
    weights = Counter(id(module._parameters.get("weight")) for module in model.modules())
    for name, module in model.named_modules():
        if (
            isinstance(module, LAYERS)
            and not isinstance(module, _STANDARDISED)
            and not getattr(module, "transposed", False)
            and width(module, "in") <= WIDEST
            and isinstance(module._parameters.get("weight"), nn.Parameter)
            and module.weight.shape[1] > 1
            and weights[id(module.weight)] == 1
        ):
            yield name, module


def _rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """(images and positions, channels), the positions of an image together, in float64: means may dwarf spreads."""
    if inputs.device.type == "mps":  # has no float64
        inputs = inputs.cpu()
    if not isinstance(layer, nn.Linear):
        inputs = inputs.movedim(-1 - len(layer.kernel_size), -1)  # type: ignore[arg-type]
    return inputs.reshape(-1, inputs.shape[-1]).double()


def step_with(pruner: Any, moments: Mapping[str, Tensor]) -> None:
    """`pruner.step()`, after which the layers that have lost inputs make up for them.

    Args:
        pruner: for the model that the moments were recorded on.
        moments: of layers' inputs; layers that are missing are left alone.
    """
    model = pruner.model
    layers = {layer: _Dense(layer) for name, layer in _compensable(model) if name in moments and not _is_frozen(layer)}
    names = {module: name for name, module in model.named_modules()}
    pruned = False
    with still_frozen(model):
        for group in pruner.step(interactive=True):
            pruned = True
            for (layer, side), gone in _removed(pruner.DG, group).items():
                if layer in layers:
                    layers[layer].lose(side, gone)
            group.prune()
    losers = {layer: dense for layer, dense in layers.items() if dense.lost.any()}
    for layer, dense in losers.items():
        make_up(layer, dense.read, moments[names[layer]], dense.lost, _following_norm(pruner.DG, layer))
    if pruned and not losers:
        logger.warning(
            "no layer made up for channels: none that can be changed has lost any (frozen layers stay); let BatchNorm "
            "have new variances, by compensate=False, or recalibrate(..., variances=True)"
        )


def _is_frozen(module: nn.Module) -> bool:
    return not all(parameter.requires_grad for parameter in module.parameters())


class _Dense:
    """The weight of a layer before pruning, and which of its outputs and inputs are left."""

    def __init__(self, layer: Any) -> None:
        self.weight: Tensor = layer.weight.detach()
        self.left = {"out": torch.arange(layer.weight.shape[0]), "in": torch.arange(layer.weight.shape[1])}

    def lose(self, side: str, gone: set[int]) -> None:
        """Channels by their place among those that are left; every group of a layer loses what its first does."""
        stays = torch.tensor([place not in gone for place in range(len(self.left[side]))])
        self.left[side] = self.left[side][stays]

    @property
    def lost(self) -> Tensor:
        """Which of the inputs of each group have gone."""
        lost = torch.ones(self.weight.shape[1], dtype=torch.bool)
        lost[self.left["in"]] = False
        return lost

    @property
    def read(self) -> Tensor:
        """What the outputs that are left read of the inputs that have gone: (outputs, inputs gone, *kernel)."""
        return self.weight[self.left["out"]][:, self.lost]


def _removed(graph: Any, group: Any) -> dict[tuple[nn.Module, str], set[int]]:
    """What goes with this group of Torch-Pruning, of the outputs and of the inputs of each module."""
    found: dict[tuple[nn.Module, str], set[int]] = {}
    for dependency, indices in group:
        found.setdefault((dependency.target.module, side_of(graph, dependency.handler)), set()).update(indices)
    return found


def _following_norm(graph: Any, layer: nn.Module) -> nn.modules.batchnorm._BatchNorm | None:
    """The BatchNorm that all outputs of the layer go to, and they alone, unless it is frozen."""
    followers = graph.module2node[layer].outputs
    norm = followers[0].module if len(followers) == 1 else None
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or _is_frozen(norm):
        return None
    return norm if len(graph.module2node[norm].inputs) == 1 else None


@torch.no_grad()
def make_up(
    layer: Any, read: Tensor, moments: Tensor, lost: Tensor, norm: nn.modules.batchnorm._BatchNorm | None = None
) -> None:
    """Change a layer that has lost some of its inputs so that it does without them.

    Be x those that went, x' the others, and W, W' their weights. Ridge regression finds the x' B + b nearest to x; then
    W B is added to W', and W b to the bias. The ridge is the one of `RIDGES` with which each half of the images
    predicts the other best, as far as W reads it. Where x is x' B + b, and nothing is padded, the layer gives what it
    gave before. Each group of a convolution has inputs, outputs, a ridge and a B of its own.

    Args:
        layer: linear or convolutional; its weight is W', and is changed in place.
        read: W, (outputs, inputs that went, *kernel).
        moments: of the inputs that it had, see `Moments`.
        lost: which of these went, (channels / groups,).
        norm: BatchNorm behind it; its running mean takes W b if the layer has no bias. Without either, b = 0.
    """
    if not moments[:, -1, -1].all():
        return  # too few images to halve
    constant, groups = layer.bias is not None or norm is not None, getattr(layer, "groups", 1)
    parts = zip(read.double().cpu().chunk(groups), _blocks(moments, groups), strict=True)
    additions, shifts = zip(*(_replacement(part, block, lost, constant) for part, block in parts), strict=True)
    layer.weight += torch.cat(additions).to(layer.weight)
    shift = torch.cat(shifts)
    if layer.bias is not None:
        layer.bias += shift.to(layer.bias)
    elif norm is not None and norm.running_mean is not None:
        norm.running_mean -= shift.to(norm.running_mean)


def _blocks(moments: Tensor, count: int) -> Iterator[Tensor]:
    """Of so many groups of channels, each with the 1 behind."""
    size = (moments.shape[-1] - 1) // count
    for start in range(0, count * size, size):
        places = [*range(start, start + size), -1]
        yield moments[:, places][:, :, places]


def _replacement(read: Tensor, moments: Tensor, lost: Tensor, constant: bool) -> tuple[Tensor, Tensor]:
    """W B, (outputs, inputs that stay, *kernel), and W b, (outputs,)."""
    demand = torch.einsum("oi...,oj...->ij", read, read)
    one, other = moments
    errors = _errors(one, other, lost, demand, constant) + _errors(other, one, lost, demand, constant)
    coefficients, shift = _prediction(moments.sum(dim=0), lost, RIDGES[int(errors.argmin())], constant)
    total = read.flatten(2).sum(2) if read.dim() > 2 else read
    return torch.einsum("si,oi...->os...", coefficients, read), total @ shift


def _prediction(moments: Tensor, lost: Tensor, ridge: float, constant: bool) -> tuple[Tensor, Tensor]:
    """B, (inputs that stay, inputs that go), and b, (inputs that go,)."""
    mean = _mean(moments, constant)
    spread = _spread(moments, mean)
    within, across = spread[~lost][:, ~lost], spread[~lost][:, lost]
    coefficients = torch.zeros_like(across)
    if math.isfinite(ridge):
        level = ridge * within.diagonal().mean() * torch.eye(len(within))
        factor, failed = torch.linalg.cholesky_ex(within + level)
        if not failed:
            coefficients = torch.cholesky_solve(across, factor)
    return coefficients, mean[lost] - mean[~lost] @ coefficients


def _errors(one: Tensor, other: Tensor, lost: Tensor, demand: Tensor, constant: bool) -> Tensor:
    """What the prediction from one half's moments misses in the other, for each of `RIDGES`: (ridges,).

    Its mean square, weighted by `demand`, (inputs that go) twice. Along the eigenvectors of the one half's spread, of
    values v, B is its product with the inputs that go over v + λ, so that all ridges take one decomposition.
    """
    mean = _mean(one, constant)
    mine, theirs = _spread(one, mean), _spread(other, mean)
    values, basis = torch.linalg.eigh(mine[~lost][:, ~lost])
    across = basis.T @ mine[~lost][:, lost]
    wanted = across @ demand
    linear = (wanted * (basis.T @ theirs[~lost][:, lost])).sum(dim=1)
    square = (wanted @ across.T) * (basis.T @ theirs[~lost][:, ~lost] @ basis)
    ridges = torch.tensor(RIDGES, dtype=values.dtype)[:, None]
    raised = values.clamp(min=0) + torch.where(ridges.isinf(), ridges, ridges * values.mean())
    gains = torch.where(raised > 0, 1 / raised, 0.0)
    whole = (theirs[lost][:, lost] * demand).sum()
    return whole - 2 * gains @ linear + (gains @ square * gains).sum(dim=1)


def _mean(moments: Tensor, constant: bool) -> Tensor:
    """Of the inputs, (inputs,); 0 where nothing can be added to the outputs."""
    found = moments[-1, :-1] / moments[-1, -1]
    return found if constant else torch.zeros_like(found)


def _spread(moments: Tensor, about: Tensor) -> Tensor:
    """Mean of (x - about)(x - about)ᵀ over the inputs x."""
    mean = moments[-1, :-1] / moments[-1, -1]
    return moments[:-1, :-1] / moments[-1, -1] - about.outer(mean) - (mean - about).outer(about)
