"""MRS as a Torch-Pruning importance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .attacks import AttackLike, build
from .batches import check_again
from .errors import InputError, check_choice, check_count, check_flag, check_number, device_of
from .measuring import Estimator, Measurement, check_settings, measure, measured_weights
from .numerics import Precision
from .pruning import layers_of, prunable_groups, refresh, side_of
from .sensitivity import Sensitivity

BaseName = Literal["sensitivity", "taylor", "magnitude"]
BASES: dict[str, Callable[[MRSImportance], Any]] = {
    "sensitivity": lambda importance: importance.sensitivity_of_channels,
    "taylor": lambda _: tp.importance.TaylorImportance(),
    "magnitude": lambda _: tp.importance.MagnitudeImportance(),
}
"""Name → what scores the channels of a group, for the `MRSImportance` that asks."""

_OUT_OF_REACH = 1e6
"""Factor on the scores of channels that are to stay, on top of the highest weight; they keep their order."""


class MRSImportance(tp.importance.Importance):
    """Scores of a base importance, weighted by the Module Robustness Sensitivity of the coupled group.

    For channel c of group g the score is `(T_g / T)^α · base_g(c)`. T_g is the group's typical sensitivity,
    √(Σ MRS_i² / weights of layer i) over its layers (see `Sensitivity.typical`); T is the geometric mean over layers.
    With `global_pruning=True`, insensitive groups are pruned more and sensitive ones less. The model is measured when
    the importance is first called, and again once its shapes have changed.

    Args:
        model: the model that the pruner prunes.
        data: re-iterable, of `(images, labels)`: (N, C, H, W) in [0, 1] and (N,), from the training split.
        attack: a torchattacks attack on `model`, or a factory `model -> attack`.
        base: which channels go within a group: `"sensitivity"`, each channel's own (see
            `Sensitivity.units`); `"taylor"`, on the adversarial loss; `"magnitude"`; or any Torch-Pruning importance.
            While it scores, each parameter's `.grad` holds the gradient of the adversarial loss, so that gradient-based
            ones work as they are; afterwards `.grad` is what it was.
        alpha: how much the sensitivity counts. 0 gives the base's scores as they are.
        min_keep: fraction of each group's channels, at least one, whose scores are raised above all others (not at
            `alpha=0`). Torch-Pruning leaves a group alone if all its channels are to go, which would spare the least
            sensitive groups; and its `max_pruning_ratio` does not limit global pruning: `1 - max_pruning_ratio` here
            does. Over several steps, it is a fraction of the channels at the first.
        round_to: as given to the pruner, which rounds the number of channels down: what is kept becomes a multiple.
        moments: also record, in `measurement().moments`, what `mrpf` needs to let layers make up for lost channels.
        epsilon, estimator, steps, max_batches, precision, channels_last, seed, progress: as for `measure_sensitivity`.

    Raises:
        InputError: an argument is unusable; when called, if a group belongs to another model, or the base scores some
            of its channels NaN.

    Example:
        Needs a model, data and a pruner around it; see the README for one that runs.

    Source: Bai et al., arXiv 2410.15176 (a reconstruction); the weighting is ours.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        attack: AttackLike,
        *,
        base: BaseName | Callable[[Any], Tensor | None] = "taylor",
        alpha: float = 1.0,
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
        measurement = self.measurement()
        weight, highest = self._weights(group, measurement)
        with lent_gradients(self.model, measurement.gradients):
            scores = checked_scores(self.base(sorted_copy(group)), len(group[0].idxs))
        if scores is None or self.alpha == 0:
            return scores
        kept = scores.topk(self._kept(group, len(scores))).indices
        weighted = scores * weight
        lifted = scores[kept] + (scores.mean() or 1.0)  # even those scored 0
        weighted[kept] = lifted * (highest * _OUT_OF_REACH)
        return weighted

    def sensitivity_of_channels(self, group: Any) -> Tensor:
        """T_u of each channel of a Torch-Pruning group, see `Sensitivity.units`: (channels of its root,)."""
        measurement = self.measurement()
        names = {module: name for name, module in self.model.named_modules()}
        readers = [
            (name, item.idxs, item.root_idxs)
            for item in group
            if (name := names.get(item.dep.target.module)) in measurement.slopes
            and side_of(group._DG, item.dep.handler) == "in"
        ]
        return torch.tensor(measurement.units(len(group[0].idxs), readers), device=device_of(self.model)).float()

    def _kept(self, group: Any, channels: int) -> int:
        """How many of the group's channels are to stay, by the most that it has been seen with."""
        root = group[0].dep.target.module, group[0].dep.handler
        self._widest[root] = max(channels, self._widest.get(root, 0))
        least = max(1, math.ceil(self.min_keep * self._widest[root]))
        return min(channels, math.ceil(least / self.round_to) * self.round_to)

    def _weights(self, group: Any, measurement: Measurement) -> tuple[float, float]:
        """`(T_g / T)^α` for the layers of this group, and for all layers, which no group exceeds."""
        names = {module: name for name, module in self.model.named_modules()}
        layers = layers_of(group)
        if any(layer not in names for layer in layers):
            raise InputError("model: the pruner prunes another model than the one this MRSImportance was made with")
        mean = geometric_mean(measurement.typical([name]) for name in measurement.modules)
        typical = measurement.typical(names[layer] for layer in layers), measurement.typical(measurement.modules)
        return relative_weight(typical[0], mean, self.alpha), relative_weight(typical[1], mean, self.alpha)


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
        return scores
    if not scores.isnan().all():
        raise InputError("base: expected a score for each channel, found NaN among them; correct the importance")
    return torch.zeros_like(scores)


def relative_weight(score: float, mean: float, alpha: float) -> float:
    """`(score / mean)^α`; what never matters counts a billionth of the mean, to stay positive."""
    return max(score / mean, 1e-9) ** alpha


def geometric_mean(values: Iterable[float]) -> float:
    """Of the positive ones among `values`; 1 if there are none."""
    logarithms = [math.log(value) for value in values if value > 0]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else 1.0


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
