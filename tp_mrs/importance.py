"""MRS as a Torch-Pruning importance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from .architectures import LAYERS, refresh
from .attacks import AttackLike, build
from .batches import check_again
from .costs import fractions, least_kept, macs_of, prices
from .errors import InputError, check_choice, check_count, check_flag, check_number, device_of
from .measuring import Estimator, Measurement, check_settings, measure, measured_weights
from .numerics import Precision
from .pruning import groups_left, layers_of, prunable_groups, side_of, width
from .sensitivity import Sensitivity
from .uncertainty import Array

BaseName = Literal["sensitivity", "taylor", "magnitude"]
BASES: dict[str, Callable[[MRSImportance], Any]] = {
    "sensitivity": lambda importance: importance.sensitivity_of_channels,
    "taylor": lambda _: tp.importance.TaylorImportance(),
    "magnitude": lambda _: tp.importance.MagnitudeImportance(),
}
"""Name → what scores the channels of a group, for the `MRSImportance` that asks."""

_HIGHEST, _OUT_OF_REACH = 1e24, 1e27
"""No channel scores more than the first but those that are to stay: the second times 1 to 2 (in float32)."""

_TOLD_APART, _LEAST = 1e-6, 1e-12
"""Fraction of a group's least loss above 0, or of the second if it has none, that tells its channels apart."""


def described(base: BaseName | Callable[[Any], Tensor | None]) -> Any:
    """What tells one base from another: the name of a function; the class of an object, and its plain attributes."""
    if isinstance(base, str):
        return base
    kind = base if hasattr(base, "__qualname__") else type(base)
    plain = {name: value for name, value in getattr(base, "__dict__", {}).items() if not callable(value)}
    return {
        "base": f"{kind.__module__}.{kind.__qualname__}",
        **{
            name: value for name, value in plain.items() if value is None or isinstance(value, bool | int | float | str)
        },
    }


class MRSImportance(tp.importance.Importance):
    """Insensitive and costly channels go first; with `global_pruning=True` as many of each group as by `allocate`.

    The base says in which order the channels of a group go. The k-th of n scores `q (T_k² / (q c))^α`, with q = k / n;
    T_k the k-th smallest sensitivity of the group's channels (see `Sensitivity.units`); and c the fraction of the
    model's multiply-accumulates, for images as those of `data`, that goes with one of them. Channels that go together,
    one of each head or group, count as one. Where all groups lose one ratio, the base alone decides.
    The model is measured when the importance is first called, and again once its shapes have changed.

    Args:
        model: the model that the pruner prunes.
        data: re-iterable, of `(images, labels)`: (N, C, H, W) in [0, 1] and (N,), from the training split.
        attack: a torchattacks attack on `model`, or a factory `model -> attack`.
        base: which channels go within a group: `"sensitivity"`, each channel's own (see
            `Sensitivity.units`); `"taylor"`, on the adversarial loss; `"magnitude"`; or any Torch-Pruning importance.
            While it scores, each parameter's `.grad` holds the gradient of the adversarial loss, so that gradient-based
            ones work as they are; afterwards `.grad` is what it was.
        alpha: how much cost and sensitivity count, as for `allocate`. 0 takes the same fraction of all groups; 1 trusts
            sensitivities wholly.
        min_keep: fraction of each group's channels, at least one, whose scores are raised above all others.
            Torch-Pruning leaves a group alone if all its channels are to go, which would spare the least
            sensitive groups; and its `max_pruning_ratio` does not limit global pruning: `1 - max_pruning_ratio` here
            does. Over several steps, it is a fraction of the channels at the first.
        round_to: as given to the pruner, which rounds the number of channels down: what is kept becomes a multiple.
        moments: also record, in `measurement().moments`, what `mrpf` needs to let layers make up for lost channels.
        epsilon, estimator, steps, max_batches, precision, channels_last, seed, progress: as for `measure_sensitivity`.
            The first three bear on what `sensitivity` returns, and not on the scores.

    Raises:
        InputError: an argument is unusable; when called, if a group belongs to another model, or the base scores some
            of its channels NaN.

    Example:
        Needs a model, data and a pruner around it; see the README for one that runs.

    Source: Bai et al., arXiv 2410.15176 (a reconstruction); the rule is ours.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        attack: AttackLike,
        *,
        base: BaseName | Callable[[Any], Tensor | None] = "sensitivity",
        alpha: float = 0.5,
        min_keep: float = 0.1,
        round_to: int = 1,
        moments: bool = False,
        epsilon: float = 0.1,
        estimator: Estimator = "first_order",
        steps: int = 5,
        max_batches: int | None = None,
        precision: Precision = "fp32",
        channels_last: bool = False,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        check_number("alpha", alpha, low=0)
        check_number("min_keep", min_keep, low=0, high=1)
        check_count("round_to", round_to)
        check_flag("moments", moments)
        settings: dict[str, Any] = {
            "epsilon": epsilon,
            "estimator": estimator,
            "steps": steps,
            "max_batches": max_batches,
            "precision": precision,
            "seed": seed,
        }
        check_settings(**settings)
        if not callable(base):
            check_choice("base", base, BASES)
        check_again("data", data)
        measured_weights(model)
        build(attack, model)
        self.model, self.data, self.attack = model, data, attack
        self.base = base if callable(base) else BASES[base](self)
        self.alpha, self.min_keep, self.round_to = alpha, min_keep, round_to
        self._widest: dict[tuple[nn.Module, Callable[..., Any]], int] = {}
        self._settings = {**settings, "moments": moments, "channels_last": channels_last, "progress": progress}
        self._measured: tuple[tuple[torch.Size, ...], Measurement] | None = None
        self._laid_out: tuple[Measurement, _Layout] | None = None

    def measurement(self) -> Measurement:
        """Scores and gradients of the model as it is now; measured anew if its shapes have changed."""
        shapes = tuple(parameter.shape for parameter in self.model.parameters())
        if self._measured is None or self._measured[0] != shapes:
            refresh(self.model)  # a pruned attention layer cannot run before
            self._measured = shapes, measure(self.model, self.data, self.attack, **self._settings)
        return self._measured[1]

    def sensitivity(self, example_inputs: Tensor) -> Sensitivity:
        """The same measurement as a `Sensitivity`, with the model's coupled groups."""
        return self.measurement().sensitivity(prunable_groups(self.model, example_inputs))

    def __call__(self, group: Any) -> Tensor | None:
        """Score the channels of a Torch-Pruning group: (channels of its root,), or None if it has no weights."""
        names = self._names(group)
        group, channels = sorted_copy(group), len(group[0].idxs)
        scores = self._by_base(group)
        if scores is None:
            return None
        repeats = self._repeats(group, names)
        units = channels // repeats
        losses = np.square(np.sort(self._units(group, names, units)))
        losses += _TOLD_APART * min(losses[losses > 0], default=_LEAST) * fractions(units)
        cost = repeats * self._cost(group, names)
        found = prices(losses, cost, self.alpha).clip(max=_HIGHEST)
        kept = math.ceil(self._kept(group, channels) / repeats)
        found[units - kept :] = _OUT_OF_REACH * (1 + fractions(units)[:kept])
        ordered = torch.empty(units, device=scores.device)
        order = scores.view(repeats, units).mean(dim=0).argsort(stable=True)
        ordered[order] = torch.tensor(found, dtype=torch.float32, device=scores.device)
        return ordered.repeat(repeats)

    def base_scores(self, group: Any) -> Tensor | None:
        """What the base alone gives the channels of a Torch-Pruning group: (channels of its root,), or None."""
        return self._by_base(sorted_copy(group))

    def _by_base(self, group: Any) -> Tensor | None:
        with lent_gradients(self.model, self.measurement().gradients):
            return checked_scores(self.base(group), len(group[0].idxs))

    def sensitivity_of_channels(self, group: Any) -> Tensor:
        """T_u of each channel of a Torch-Pruning group, see `Sensitivity.units`: (channels of its root,)."""
        units = self._units(group, self._names(group), len(group[0].idxs))
        return torch.tensor(units, device=device_of(self.model)).float()

    def _units(self, group: Any, names: Mapping[nn.Module, str], count: int) -> Array:
        """T_u of so many units, of which each is every `count`-th channel of the root."""
        measurement = self.measurement()
        readers = [
            (name, item.idxs, [index % count for index in item.root_idxs])
            for item in group
            if (name := names.get(item.dep.target.module)) in measurement.slopes
            and side_of(group._DG, item.dep.handler) == "in"
        ]
        return measurement.units(count, readers)

    def _repeats(self, group: Any, names: Mapping[nn.Module, str]) -> int:
        """How many channels of the group's root go together, with attention heads and grouped convolutions."""
        table = self._layout().repeats
        sides = ((names.get(item.dep.target.module), side_of(group._DG, item.dep.handler)) for item in group)
        repeats = max(table.get(side, 1) for side in sides)
        return repeats if len(group[0].idxs) % repeats == 0 else 1

    def _cost(self, group: Any, names: Mapping[nn.Module, str]) -> float:
        """The fraction of the multiply-accumulates that goes with each channel of the group's root."""
        macs, cost = self._layout().macs, 0.0
        for item in group:
            module, side = item.dep.target.module, side_of(group._DG, item.dep.handler)
            full, channels = macs.get(names.get(module, ""), 0.0), width(module, "out" if side == "both" else side)
            if channels:  # a PReLU's are not told
                cost += full * len(item.idxs) / channels
        return cost / len(group[0].idxs)

    def _layout(self) -> _Layout:
        """Of the model as it was measured last."""
        measurement = self.measurement()
        if self._laid_out is None or self._laid_out[0] is not measurement:
            first = next(self.model.parameters())
            example = torch.zeros(1, *measurement.image_shape, device=first.device, dtype=first.dtype)
            self._laid_out = measurement, _Layout.of(self.model, example)
        return self._laid_out[1]

    def _kept(self, group: Any, channels: int) -> int:
        """How many of the group's channels are to stay, by the most that it has been seen with."""
        root = group[0].dep.target.module, group[0].dep.handler
        self._widest[root] = max(channels, self._widest.get(root, 0))
        least = least_kept(self._widest[root], self.min_keep)
        return min(channels, math.ceil(least / self.round_to) * self.round_to)

    def _names(self, group: Any) -> dict[nn.Module, str]:
        """Module of this model → its name."""
        names = {module: name for name, module in self.model.named_modules()}
        if any(layer not in names for layer in layers_of(group)):
            raise InputError("model: the pruner prunes another model than the one this MRSImportance was made with")
        return names


@dataclass(frozen=True)
class _Layout:
    """Name of each layer → its fraction of the multiply-accumulates; one of its sides → channels that go together."""

    macs: dict[str, float]
    repeats: dict[tuple[str | None, str], int]

    @classmethod
    def of(cls, model: nn.Module, example: Tensor) -> _Layout:
        layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
        macs: dict[str, float] = {}
        for full, name in macs_of(model, example, layers):
            macs[name] = macs.get(name, 0.0) + full  # attention is counted as a whole, under its first layer's name
        groups = groups_left(model, example)
        repeats: dict[tuple[str | None, str], int] = {
            (member.name, member.side): group.repeats for group in groups for member in group.members
        }
        return cls(macs, repeats)


def checked_scores(scores: object, channels: int) -> Tensor | None:
    """A base's scores; 0 for all where they are 0/0, as Torch-Pruning divides by a group's mean.

    Raises:
        InputError: they are not one number for each channel, or only some are NaN.
    """
    if scores is None:
        return None
    if not isinstance(scores, Tensor) or scores.shape != (channels,):
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(
            f"base: expected it to return a tensor with a score for each of the group's {channels} channels, or None, "
            f"got {got}; pass an object such as tp.importance.MagnitudeImportance(), or a function of a group"
        )
    if not scores.isnan().any():
        return scores.float()
    if not scores.isnan().all():
        raise InputError("base: expected a score for each channel, found NaN among them; correct the importance")
    return torch.zeros_like(scores)


@contextmanager
def lent_gradients(model: nn.Module, gradients: dict[str, Tensor]) -> Iterator[None]:
    """Each parameter's `.grad` is the one from `gradients` inside, and what it was outside."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name, torch.zeros_like(parameter))
    try:
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


def sorted_copy(group: Any) -> Any:
    """A copy whose indices ascend, with the root's channels in the same order, counted within this group.

    Torch-Pruning's Taylor importance sorts a group's indices in place, which changes the caller's group and loses
    track of which channel is which where they did not ascend; and its scores go wrong for groups of some channels.
    """
    position = {index: place for place, index in enumerate(group[0].idxs)}
    copy = tp.Group()
    copy._DG = group._DG
    for item in group:
        order = sorted(range(len(item.idxs)), key=item.idxs.__getitem__)
        copy.add_dep(item.dep, [item.idxs[i] for i in order])
        copy[-1].root_idxs = [position[item.root_idxs[i]] for i in order]
    return copy
