"""Module Robustness Sensitivity: measuring it, and the result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import Tensor, nn
from tqdm.auto import tqdm

from ._version import versions
from .attacks import AttackLike, bind, describe
from .batches import checked_batches
from .borrowing import borrowed, seed_all
from .errors import InputError, check_choice, check_count, check_number, device_of
from .estimators import SMALLEST_BLOCK, Batch, RobustLoss, first_order, projected_gradient_ascent
from .files import read_json, write_json
from .numerics import Precision, check_precision, in_channels_last
from .processes import failing_together, gather, place
from .pruning import LAYERS, Group, prunable_groups
from .uncertainty import Array, mean_rank_correlation, resampled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Estimator = Literal["first_order", "pga"]
Score = Literal["modules", "groups", "typical"]
FORMAT = "tp_mrs.sensitivity/2"

FEWEST_BLOCKS = 8
"""With fewer blocks, nothing is said of uncertainty."""

STABLE = 0.95
"""The rank correlation from which a ranking counts as stable."""


@dataclass(frozen=True)
class Sensitivity:
    """How much robust loss the worst small change of each module, and of each coupled group, costs.

    Attributes:
        modules: name of each convolutional or linear layer → its sensitivity MRS_i, in nats of cross-entropy.
        members: name of each coupled group (its root layer's) → its layers, those whose outputs are pruned and those
            whose inputs go with them.
        sizes: name of each layer → number of weights.
        robust_loss: mean cross-entropy on the attacked images, in nats.
        robust_accuracy: fraction of the attacked images classified correctly.
        blocks: number of images in each block that the calibration images were split into.
        shares: name of each layer → each block's share of its sensitivity; they add up to it.
        together: name of each group → the cost of the worst change of all its layers at once, each in its own ball, in
            nats; empty unless it was asked for.
        settings: how it was measured.
        versions: of the packages that it was measured with.
    """

    modules: Mapping[str, float]
    members: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]
    robust_loss: float
    robust_accuracy: float
    blocks: tuple[int, ...]
    shares: Mapping[str, tuple[float, ...]]
    together: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def images(self) -> int:
        """Number of calibration images."""
        return sum(self.blocks)

    @cached_property
    def groups(self) -> dict[str, float]:
        """Name of each group → MRS_g, the sum over its layers, in nats."""
        return self._by_group("groups", self._scores())

    @cached_property
    def typical(self) -> dict[str, float]:
        """Name of each group → what a random change of the same size costs instead of the worst one, in nats.

        To first order and as a root mean square: √(Σ MRS_i² / weights of layer i). Pruning ratios are set by this.
        """
        return self._by_group("typical", self._scores())

    @property
    def has_intervals(self) -> bool:
        """Whether there were enough images for `intervals`."""
        return len(self.blocks) >= FEWEST_BLOCKS

    def intervals(self, of: Score = "typical", *, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Where the scores lie, had other images of the same kind been drawn: percentiles of a bootstrap over blocks.

        The worst changes are held fixed, so this is a little too narrow where few images decide their direction.

        Args:
            of: `"modules"`, `"groups"` or `"typical"`.
            level: of confidence.

        Raises:
            InputError: an argument is unusable, or there are too few images to tell.
        """
        check_choice("of", of, get_args(Score))
        check_number("level", level, low=0, high=1)
        if not self.has_intervals:
            raise InputError(
                f"data: {self.images} calibration images are too few for intervals; "
                f"use at least {FEWEST_BLOCKS * SMALLEST_BLOCK}"
            )
        samples = self._resampled(of)
        ends = np.percentile(samples, [50 * (1 - level), 50 * (1 + level)], axis=0).T.tolist()
        return {name: (low, high) for name, (low, high) in zip(self._names(of), ends, strict=True)}

    def rank_stability(self, *, times: int = 1) -> float:
        """Mean rank correlation of the groups' ranking by `typical` with those of bootstrap samples; 1 is stable.

        Args:
            times: how many times as many images to imagine.
        """
        return mean_rank_correlation(np.array(list(self.typical.values())), self._resampled("typical", times=times))

    def images_for_stable_ranking(self) -> int | None:
        """About how many images would bring `rank_stability` to 0.95; None if it takes more than 64 times as many."""
        for times in (1, 2, 4, 8, 16, 32, 64):
            if self.rank_stability(times=times) >= STABLE:
                return times * self.images
        return None

    def __str__(self) -> str:
        intervals = self.intervals() if self.has_intervals else {}
        width = max([len(name) for name in self.groups] + [len("group")])
        top = max(self.typical.values(), default=0.0) or 1.0
        lines = [
            f"Module Robustness Sensitivity on {self.images} images: "
            f"robust accuracy {self.robust_accuracy:.1%}, robust loss {self.robust_loss:.3f}",
            f"{'group':<{width}}  layers  {'MRS':>9}  {'typical':>9}" + ("  95% interval       " if intervals else ""),
        ]
        for name in sorted(self.groups, key=lambda name: -self.typical[name]):
            bar = "█" * round(20 * self.typical[name] / top)
            numbers = f"{len(self.members[name]):>6}  {self.groups[name]:>9.4f}  {self.typical[name]:>9.6f}"
            if intervals:
                numbers += "  {:>8.6f}–{:<8.6f}".format(*intervals[name])
            lines.append(f"{name:<{width}}  {numbers}  {bar}".rstrip())
        return "\n".join([*lines, *self._doubts()])

    def _doubts(self) -> list[str]:
        """A sentence if the ranking might be another one with other images."""
        if not self.has_intervals:
            return [f"Too few images to say how stable this is; use at least {FEWEST_BLOCKS * SMALLEST_BLOCK}."]
        stability = self.rank_stability()
        if stability >= STABLE:
            return []
        enough = self.images_for_stable_ranking()
        remedy = f"about {enough} images would settle it" if enough else "it would take far more images to settle it"
        return [
            f"The ranking is not stable yet (rank correlation {stability:.2f} between samples of images): {remedy}."
        ]

    # scores as arrays, (…, modules) and (…, groups)

    def _scores(self) -> Array:
        return np.array(list(self.modules.values()))

    def _resampled(self, of: Score, *, times: int = 1) -> Array:
        """(bootstrap samples, modules or groups)."""
        shares = np.array([self.shares[name] for name in self.modules]).T
        samples = resampled(shares, self.blocks, times=times)
        return samples if of == "modules" else np.stack(list(self._by_group(of, samples).values()), axis=-1)

    def _names(self, of: Score) -> list[str]:
        return list(self.modules if of == "modules" else self.members)

    def _by_group(self, of: Score, scores: Any) -> dict[str, Any]:
        """Combine the modules' scores over each group."""
        column = {name: index for index, name in enumerate(self.modules)}
        found = {}
        for group, layers in self.members.items():
            columns = [column[layer] for layer in layers if layer in column]
            sizes = np.array([self.sizes[layer] for layer in layers if layer in column], dtype=np.float64)
            found[group] = combined(scores[..., columns], sizes, typical=of == "typical")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, the groups' scores too, in plain types."""
        return {**asdict(self), "groups": self.groups, "typical": self.typical}

    def save(self, path: str | Path) -> Path:
        """Write `to_dict()` as JSON. Raises `InputError` if the file cannot be written."""
        return write_json(path, {"format": FORMAT, **self.to_dict()})

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `save` wrote. Raises `InputError` if the file holds something else."""
        content = read_json(path, FORMAT)
        content = {key: value for key, value in content.items() if key not in ("format", "groups", "typical")}
        try:
            for key in ("members", "shares"):
                content[key] = {name: tuple(values) for name, values in content[key].items()}
            content["blocks"] = tuple(content["blocks"])
            return cls(**content)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"path: {path} lacks parts of a sensitivity ({error})") from error

    def plot(self, ratios: Mapping[str, float] | None = None) -> Figure:
        """A matplotlib figure of the groups' sensitivities, and of the pruning ratios if they are given."""
        from .plotting import plot_sensitivity

        return plot_sensitivity(self, ratios)


@dataclass(frozen=True)
class Measurement:
    """What one measurement found, layer by layer.

    Attributes:
        shares: name of each layer → each block's share of its score, in nats; they add up to the score.
        blocks: number of images in each block, on all processes.
        sizes: name of each layer → number of weights.
        aliases: name of each layer that shares its weight with an earlier one → that one's name.
        gradients: name of each parameter → the robust loss's gradient.
        together: name of each group → the cost of the worst change of all its layers at once; empty if not asked for.
        robust_loss: in nats.
        robust_accuracy: fraction of the images.
        settings: how it was measured.
    """

    shares: dict[str, tuple[float, ...]]
    blocks: tuple[int, ...]
    sizes: dict[str, int]
    aliases: dict[str, str]
    gradients: dict[str, Tensor]
    together: dict[str, float]
    robust_loss: float
    robust_accuracy: float
    settings: dict[str, Any]

    @cached_property
    def modules(self) -> dict[str, float]:
        """Name of each layer → its score, in nats."""
        return {name: math.fsum(shares) for name, shares in self.shares.items()}

    def sensitivity(self, groups: Iterable[Group]) -> Sensitivity:
        """The same with the coupled groups."""
        return Sensitivity(
            modules=self.modules,
            members={group.name: self._measured(group.layers) for group in groups},
            sizes=self.sizes,
            robust_loss=self.robust_loss,
            robust_accuracy=self.robust_accuracy,
            blocks=self.blocks,
            shares=self.shares,
            together=self.together,
            settings=self.settings,
        )

    def typical(self, layers: Iterable[str]) -> float:
        """What a random change of these layers, of the size that MRS allows, costs; see `Sensitivity.typical`."""
        names = self._measured(layers)
        scores, sizes = ([of[name] for name in names] for of in (self.modules, self.sizes))
        return float(combined(np.array(scores), np.array(sizes, dtype=np.float64), typical=True))

    def _measured(self, layers: Iterable[str]) -> tuple[str, ...]:
        """The names under which the layers were measured; weights that layers share count once."""
        names = dict.fromkeys(self.aliases.get(layer, layer) for layer in layers)
        return tuple(name for name in names if name in self.shares)


def combined(scores: Array, sizes: Array, *, typical: bool) -> Array:
    """The score of a group from those of its layers, (…, layers) and (layers,): their sum, or the typical one.

    A random direction in n dimensions meets the gradient with a root mean square of 1/√n of its length, where the worst
    one meets all of it; and what independent changes cost adds up in squares. Pruning takes away the weakest channels,
    which is nearer to a random change than to the worst.
    """
    return np.sqrt((np.square(scores) / sizes).sum(axis=-1)) if typical else scores.sum(axis=-1)


def measure_sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    attack: AttackLike,
    *,
    example_inputs: Tensor,
    epsilon: float = 0.1,
    estimator: Estimator = "first_order",
    steps: int = 3,
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
    steps: int = 3,
    groups: Sequence[Group] = (),
    max_batches: int | None = None,
    precision: Precision = "fp32",
    channels_last: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Measurement:
    """As `measure_sensitivity`, with the gradients, and for `groups` what they cost together.

    Without groups it needs no dependency graph.
    """
    check_settings(
        epsilon=epsilon, estimator=estimator, steps=steps, max_batches=max_batches, precision=precision, seed=seed
    )
    weights, aliases = measured_weights(model)
    with borrowed(model), in_channels_last(model, channels_last):
        with failing_together():
            batches = _attacked(model, data, attack, max_batches=max_batches, seed=seed, progress=progress)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        loss = RobustLoss(model, batches, precision=precision)
        base, shares = first_order(loss, weights, epsilon)
        accuracy = loss.correct / loss.images
        gradients = {
            name: parameter.grad.detach() for name, parameter in model.named_parameters() if parameter.grad is not None
        }
        ascend = partial(_ascend, loss, weights, gradients, base=base, epsilon=epsilon, steps=steps, progress=progress)
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
    found = gather((loss.sizes.tolist(), {name: share.tolist() for name, share in shares.items()}))
    return Measurement(
        shares={name: tuple(share for _, own in found for share in own[name]) for name in weights},
        blocks=tuple(size for sizes, _ in found for size in sizes),
        sizes={name: weight.numel() for name, weight in weights.items()},
        aliases=aliases,
        gradients=gradients,
        together=together,
        robust_loss=robust_loss,
        robust_accuracy=accuracy,
        settings=settings,
    )


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
    """Name → each block's share of what the worst change found of these layers costs, those that the model uses."""
    found = {}
    bar = tqdm(layers.items(), "sensitivity", unit=unit, disable=None if progress and layers else True, leave=False)
    for name, own in bar:
        used = [layer for layer in own if layer in weights and f"{layer}.weight" in gradients]
        if not used:
            found[name] = torch.zeros_like(base)
            continue
        found[name] = projected_gradient_ascent(
            loss,
            [weights[layer] for layer in used],
            [gradients[f"{layer}.weight"] for layer in used],
            base=base,
            epsilon=epsilon,
            steps=steps,
        )
    return found


def _attacked(
    model: nn.Module,
    data: Iterable[Any],
    attack: AttackLike,
    *,
    max_batches: int | None,
    seed: int,
    progress: bool,
) -> list[Batch]:
    """This process's batches of adversarial images; the random start of each depends on its number alone."""
    number, count = (0, 1) if isinstance(data, (DataLoaderShard, DataLoaderDispatcher)) else place()
    perturb = bind(attack, model)
    batches = []
    clean = checked_batches(model, data, max_batches=max_batches, description="attacking", progress=progress)
    for index, (images, labels) in enumerate(clean):
        if index % count == number:
            seed_all(seed + index)
            batches.append((perturb(images, labels), labels))
    if not batches:
        raise InputError(f"data: no batch for process {number} of {count}; use smaller batches or fewer processes")
    return batches


def check_settings(
    *, epsilon: float, estimator: str, steps: int, max_batches: int | None, precision: str, seed: int
) -> None:
    """Raise `InputError` unless these settings of a measurement are usable."""
    check_number("epsilon", epsilon, low=0, open_low=True)
    check_choice("estimator", estimator, get_args(Estimator))
    check_count("steps", steps)
    check_precision(precision)
    check_count("seed", seed, low=0)
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
    for name, module in model.named_modules():
        weight = module.weight if isinstance(module, LAYERS) else None
        if not isinstance(weight, nn.Parameter):
            continue
        if weight.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"model: expected weights of torch.float32, {name}'s are {weight.dtype}; small changes would be lost "
                "in rounding. Use model.float(), and precision='bf16' for speed"
            )
        owner = owners.setdefault(id(weight), name)
        if owner == name:
            found[name] = weight
        else:
            aliases[name] = owner
    if not found:
        raise InputError("model: it has no convolutional or linear layer, so there is nothing to measure")
    return found, aliases
