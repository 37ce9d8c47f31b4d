"""Measuring Module Robustness Sensitivity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .architectures import LAYERS
from .attacks import AttackLike, attacked_batches, describe
from .borrowing import borrowed
from .compensation import Moments, recording, summed
from .errors import InputError, check_choice, check_count, check_full_precision, check_number, check_seed, device_of
from .estimators import RobustLoss, first_order, projected_gradient_ascent
from .numerics import Precision, check_precision, in_channels_last
from .processes import failing_together, gather
from .pruning import Group, prunable_groups
from .readers import reading
from .sensitivity import Sensitivity, combined
from .uncertainty import Array

Estimator = Literal["first_order", "pga"]

Reader: TypeAlias = tuple[str, Sequence[int], Sequence[int]]
"""A layer by name, channels that it reads, and the unit that each belongs to."""


@dataclass(frozen=True)
class Measurement:
    """What one measurement found, layer by layer.

    Attributes:
        shares: name of each layer → each block's share of its score, in nats; they add up to the score.
        blocks: number of images in each block, on all processes.
        sizes: name of each layer → number of weights.
        aliases: name of each layer that shares its weight with an earlier one → that one's name.
        gradients: name of each parameter → the robust loss's gradient.
        slopes: name of each layer → how fast the loss of each image changes as each of the channels that the layer
            reads fades, (images, inputs); of an image, all together have the norm 1.
        image_shape: (C, H, W) of the first image.
        together: name of each group → the cost of the worst change of all its layers at once; empty if not asked for.
        moments: of the layers' inputs on the attacked images, see `compensation.Moments`; empty if not asked for.
        robust_loss: in nats.
        robust_accuracy: fraction of the images.
        settings: how it was measured.
    """

    shares: dict[str, tuple[float, ...]]
    blocks: tuple[int, ...]
    sizes: dict[str, int]
    aliases: dict[str, str]
    gradients: dict[str, Tensor]
    slopes: dict[str, Array]
    image_shape: tuple[int, ...]
    together: dict[str, float]
    moments: Moments
    robust_loss: float
    robust_accuracy: float
    settings: dict[str, Any]

    @cached_property
    def modules(self) -> dict[str, float]:
        """Name of each layer → its score, in nats."""
        return {name: math.fsum(shares) for name, shares in self.shares.items()}

    def sensitivity(self, groups: Sequence[Group]) -> Sensitivity:
        """The same with the coupled groups."""
        return Sensitivity(
            modules=self.modules,
            members={group.name: self._measured(group.layers) for group in groups},
            sizes=self.sizes,
            robust_loss=self.robust_loss,
            robust_accuracy=self.robust_accuracy,
            blocks=self.blocks,
            shares=self.shares,
            units={group.name: self._units(group) for group in groups},
            together=self.together,
            settings=self.settings,
        )

    def units(self, count: int, readers: Iterable[Reader]) -> Array:
        """The sensitivity of each unit that these layers read, (count,); see `Sensitivity.units`. 1 if none does."""
        found = [(self.slopes[name][:, list(channels)].T, list(units)) for name, channels, units in readers]
        if not found:
            return np.ones(count)
        together = np.zeros((count, found[0][0].shape[1]))
        for slopes, units in found:
            np.add.at(together, units, slopes)
        return np.sqrt(np.square(together).mean(axis=1))

    def _units(self, group: Group) -> tuple[float, ...]:
        readers = [
            (member.name, member.channels, member.units)
            for member in group.members
            if member.side == "in" and member.name in self.slopes
        ]
        return tuple(self.units(group.units, readers).tolist())

    def typical(self, layers: Iterable[str]) -> float:
        """What a random change of these layers, of the size that MRS allows, costs; see `Sensitivity.typical`."""
        names = self._measured(layers)
        scores, sizes = ([of[name] for name in names] for of in (self.modules, self.sizes))
        return float(combined(np.array(scores), np.array(sizes, dtype=np.float64), typical=True))

    def _measured(self, layers: Iterable[str]) -> tuple[str, ...]:
        """The names under which the layers were measured; weights that layers share count once."""
        names = dict.fromkeys(self.aliases.get(layer, layer) for layer in layers)
        return tuple(name for name in names if name in self.shares)


def measure_sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    attack: AttackLike,
    *,
    example_inputs: Tensor,
    epsilon: float = 0.1,
    estimator: Estimator = "first_order",
    steps: int = 5,
    together: bool = False,
    max_batches: int | None = None,
    precision: Precision = "fp32",
    channels_last: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity:
    """Measure Module Robustness Sensitivity (MRS) of every layer and coupled group of `model`.

    The images are attacked once, on the model as given. With R(θ) the mean cross-entropy on them in eval mode,

        MRS_i = max over ‖δ‖₂ ≤ ε‖θ_i‖₂ of R(θ with θ_i + δ) − R(θ)

    for the weight θ_i of each convolutional or linear layer, and MRS_g = the sum over the layers of group g.

    Source: Bai et al., arXiv 2410.15176, reconstructed after Module Robust Criticality (RiFT, arXiv 2308.02533).

    Args:
        model: in any mode; comes back exactly as it was.
        data: an iterable of `(images, labels)`: (N, C, H, W) in [0, 1] and (N,). Take it from the training split.
        attack: a torchattacks attack on `model`, or a factory `model -> attack`.
        example_inputs: (N, C, H, W), on the model's device; traces the dependency graph.
        epsilon: radius of the ball, relative to the norm of each weight.
        estimator: `"first_order"`, ε‖θ‖‖∂R/∂θ‖ from one backward pass for all layers; or `"pga"`, projected
            normalised-gradient ascent, layer by layer.
        steps: of `"pga"`, and of `together`.
        together: also ascend with all layers of a group at once, for each group; see `Sensitivity.together`. Neither
            pruning ratios nor the table depend on it.
        max_batches: use at most so many batches of `data`.
        precision: `"bf16"` measures under autocast; attacks are made in full precision all the same.
        channels_last: run the model in that memory layout; often faster for convolutions.
        seed: of the attack's random start.
        progress: show a bar on a terminal.

    Raises:
        InputError: an argument or a batch is unusable.
        DivergenceError: the attack or the loss is not finite.

    Notes:
        Where torch.distributed is running, as under `torchrun` once `accelerate.PartialState()` or an `Accelerator` has
        been made, each process takes its part of the batches and all get the same result. Every process must be given
        the same model and the same `data`, in the same order, all of it.

        RiFT takes plain gradient steps with learning rate 1 and scores on the test split; here steps are normalised,
        so that they reach the edge of the ball where gradients are small, and the training split is used. Biases and
        norm layers are left alone.
    """
    measured_weights(model)
    groups = prunable_groups(model, example_inputs)
    measurement = measure(
        model,
        data,
        attack,
        epsilon=epsilon,
        estimator=estimator,
        steps=steps,
        groups=groups if together else (),
        max_batches=max_batches,
        precision=precision,
        channels_last=channels_last,
        seed=seed,
        progress=progress,
    )
    return measurement.sensitivity(groups)


def measure(
    model: nn.Module,
    data: Iterable[Any],
    attack: AttackLike,
    *,
    epsilon: float = 0.1,
    estimator: Estimator = "first_order",
    steps: int = 5,
    groups: Sequence[Group] = (),
    moments: bool = False,
    max_batches: int | None = None,
    precision: Precision = "fp32",
    channels_last: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Measurement:
    """As `measure_sensitivity`, with the gradients, and for `groups` what they cost together.

    Without groups it needs no dependency graph. With `moments`, layers' inputs are recorded on the way.
    """
    check_settings(
        epsilon=epsilon, estimator=estimator, steps=steps, max_batches=max_batches, precision=precision, seed=seed
    )
    weights, aliases = measured_weights(model)
    with borrowed(model), in_channels_last(model, channels_last):
        with failing_together():
            batches = attacked_batches(model, data, attack, max_batches=max_batches, seed=seed, progress=progress)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        loss = RobustLoss(model, batches, precision=precision)
        record: AbstractContextManager[Moments] = recording(model) if moments else nullcontext({})
        with reading(model) as parts, record as recorded:
            base, shares = first_order(loss, weights, epsilon)
        accuracy = loss.correct / loss.images
        gradients = {
            name: parameter.grad.detach() for name, parameter in model.named_parameters() if parameter.grad is not None
        }
        slopes = {name: weight.grad.detach() for name, weight in weights.items() if weight.grad is not None}
        ascend = partial(_ascend, loss, weights, slopes, base=base, epsilon=epsilon, steps=steps, progress=progress)
        if estimator == "pga":
            shares |= ascend({name: (name,) for name in weights}, "layer")
        layers = {group.name: dict.fromkeys(aliases.get(layer, layer) for layer in group.layers) for group in groups}
        together = {name: loss.total(found) for name, found in ascend(layers, "group").items()}
        settings: dict[str, Any] = {
            "estimator": estimator,
            "epsilon": epsilon,
            "attack": describe(attack, model),
            "max_batches": max_batches,
            "precision": precision,
            "seed": seed,
        }
        if estimator == "pga" or groups:
            settings["steps"] = steps
        robust_loss = loss.total(base)
    own = {name: torch.cat(slopes).cpu().numpy() for name, slopes in parts.items()}
    found = gather((loss.sizes.tolist(), {name: share.tolist() for name, share in shares.items()}, own))
    return Measurement(
        shares={name: tuple(share for _, shares, _ in found for share in shares[name]) for name in weights},
        blocks=tuple(size for sizes, *_ in found for size in sizes),
        sizes={name: weight.numel() for name, weight in weights.items()},
        aliases=aliases,
        gradients=gradients,
        slopes=relative({name: np.concatenate([own[2][name] for own in found]) for name in parts}),
        image_shape=tuple(batches[0][0].shape[1:]),
        together=together,
        moments=summed(recorded, device_of(model)),
        robust_loss=robust_loss,
        robust_accuracy=accuracy,
        settings=settings,
    )


def relative(slopes: Mapping[str, Array]) -> dict[str, Array]:
    """Divided by the norm of all slopes of each image, so that each image counts alike, however high its loss."""
    squares = sum(np.square(own, dtype=np.float64).sum(axis=1, keepdims=True) for own in slopes.values())
    norms = np.sqrt(squares)
    return {name: np.divide(own, norms, out=np.zeros_like(own), where=norms > 0) for name, own in slopes.items()}


def _ascend(
    loss: RobustLoss,
    weights: Mapping[str, nn.Parameter],
    gradients: Mapping[str, Tensor],
    layers: Mapping[str, Iterable[str]],
    unit: str,
    *,
    base: Tensor,
    epsilon: float,
    steps: int,
    progress: bool,
) -> dict[str, Tensor]:
    """Name → each block's share of what the worst change found of these layers costs; those with gradients move."""
    found = {}
    bar = tqdm(layers.items(), "sensitivity", unit=unit, disable=None if progress and layers else True, leave=False)
    for name, own in bar:
        used = [layer for layer in own if layer in gradients]
        if not used:
            found[name] = torch.zeros_like(base)
            continue
        found[name] = projected_gradient_ascent(
            loss,
            [weights[layer] for layer in used],
            [gradients[layer] for layer in used],
            base=base,
            epsilon=epsilon,
            steps=steps,
        )
    return found


def check_settings(
    *, epsilon: float, estimator: str, steps: int, max_batches: int | None, precision: str, seed: int
) -> None:
    """Raise `InputError` unless these settings of a measurement are usable."""
    check_number("epsilon", epsilon, low=0, open_low=True)
    check_choice("estimator", estimator, get_args(Estimator))
    check_count("steps", steps)
    check_precision(precision)
    check_seed(seed)
    if max_batches is not None:
        check_count("max_batches", max_batches)


def measured_weights(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Name of each convolutional or linear layer → its weight; and of those that share an earlier one's → its name.

    Raises:
        InputError: there is none, or the weights are of half precision.
    """
    device_of(model)
    found: dict[str, nn.Parameter] = {}
    owners: dict[int, str] = {}
    aliases: dict[str, str] = {}
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise InputError("model: expected the model itself, got DistributedDataParallel; pass model.module")
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, LAYERS) else None
        if not isinstance(weight, nn.Parameter):
            continue
        check_full_precision(name, weight)
        owner = owners.setdefault(id(weight), name)
        if owner == name:
            found[name] = weight
        else:
            aliases[name] = owner
    if not found:
        raise InputError("model: it has no convolutional or linear layer, so there is nothing to measure")
    return found, aliases
