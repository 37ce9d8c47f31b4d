"""Module Robustness Sensitivity: measuring it, and the result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, nn
from tqdm.auto import tqdm

from ._version import versions
from .attacks import AttackLike, bind, describe
from .batches import checked_batches
from .borrowing import borrowed
from .errors import InputError, check_choice, check_count, check_number, device_of
from .estimators import first_order, projected_gradient_ascent, robust_loss
from .files import read_json, write_json
from .pruning import LAYERS, Group, prunable_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Estimator = Literal["first_order", "pga"]
FORMAT = "tp_mrs.sensitivity/1"


@dataclass(frozen=True)
class Sensitivity:
    """How much robust loss the worst small change of each module, and of each coupled group, costs.

    Attributes:
        modules: name of each convolutional or linear layer → its sensitivity, in nats of cross-entropy.
        groups: name of each coupled group's root layer → MRS_g, the sum over its layers.
        typical: name of each group → what a random change of the same size costs instead of the worst one, to first
            order and as a root mean square: the sum of MRS_i / √(weights of layer i). Pruning ratios are set by this.
        members: name of each group → its layers, those whose outputs are pruned and those whose inputs go with them.
        robust_loss: mean cross-entropy on the attacked images, in nats.
        robust_accuracy: fraction of the attacked images classified correctly.
        images: number of calibration images.
        settings: how it was measured.
        versions: of the packages that it was measured with.
    """

    modules: Mapping[str, float]
    groups: Mapping[str, float]
    typical: Mapping[str, float]
    members: Mapping[str, tuple[str, ...]]
    robust_loss: float
    robust_accuracy: float
    images: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    def __str__(self) -> str:
        width = max([len(name) for name in self.groups] + [len("group")])
        top = max(self.typical.values(), default=0.0) or 1.0
        lines = [
            f"Module Robustness Sensitivity on {self.images} images: "
            f"robust accuracy {self.robust_accuracy:.1%}, robust loss {self.robust_loss:.3f}",
            f"{'group':<{width}}  layers  {'MRS':>9}  {'typical':>9}",
        ]
        for name in sorted(self.groups, key=lambda name: -self.typical[name]):
            bar = "█" * round(20 * self.typical[name] / top)
            numbers = f"{len(self.members[name]):>6}  {self.groups[name]:>9.4f}  {self.typical[name]:>9.6f}"
            lines.append(f"{name:<{width}}  {numbers}  {bar}".rstrip())
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON. Raises `InputError` if the file cannot be written."""
        return write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `save` wrote. Raises `InputError` if the file holds something else."""
        content = read_json(path, FORMAT)
        del content["format"]
        try:
            content["members"] = {name: tuple(layers) for name, layers in content["members"].items()}
            return cls(**content)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"path: {path} lacks parts of a sensitivity ({error})") from error

    def plot(self, ratios: Mapping[str, float] | None = None) -> Figure:
        """A matplotlib figure of the groups' sensitivities, and of the pruning ratios if they are given."""
        from .plotting import plot_sensitivity

        return plot_sensitivity(self, ratios)


@dataclass(frozen=True)
class Measurement:
    """Score and number of weights of each layer, and the robust loss's gradient by parameter name."""

    modules: dict[str, float]
    sizes: dict[str, int]
    gradients: dict[str, Tensor]
    robust_loss: float
    robust_accuracy: float
    images: int
    settings: dict[str, Any]

    def sensitivity(self, groups: Iterable[Group]) -> Sensitivity:
        """Sum the modules' scores over each coupled group."""
        members = {group.name: group.layers for group in groups}
        return Sensitivity(
            modules=self.modules,
            groups={name: sum(self.modules.get(layer, 0.0) for layer in layers) for name, layers in members.items()},
            typical={name: self.typical(layers) for name, layers in members.items()},
            members=members,
            robust_loss=self.robust_loss,
            robust_accuracy=self.robust_accuracy,
            images=self.images,
            settings=self.settings,
        )

    def typical(self, layers: Iterable[str]) -> float:
        """What a random change of these layers, of the size that MRS allows, costs to first order.

        A random direction in d dimensions meets the gradient with a root mean square of 1/√d of its length, where the
        worst one meets all of it. Pruning takes away the weakest channels, so it is nearer to the former.
        """
        return sum(self.modules[layer] / math.sqrt(self.sizes[layer]) for layer in layers if layer in self.modules)


def measure_sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    attack: AttackLike,
    *,
    example_inputs: Tensor,
    epsilon: float = 0.1,
    estimator: Estimator = "first_order",
    steps: int = 3,
    max_batches: int | None = None,
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
        steps: of `"pga"`.
        max_batches: use at most so many batches of `data`.
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
    groups = prunable_groups(model, example_inputs)
    measurement = measure(
        model,
        data,
        attack,
        epsilon=epsilon,
        estimator=estimator,
        steps=steps,
        max_batches=max_batches,
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
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Measurement:
    """As `measure_sensitivity`, without the groups, and with the gradients. Needs no dependency graph."""
    check_settings(epsilon=epsilon, estimator=estimator, steps=steps, max_batches=max_batches)
    device_of(model)
    weights = measured_weights(model)
    with borrowed(model, seed=seed):
        perturb = bind(attack, model)
        clean = checked_batches(model, data, max_batches=max_batches, description="attacking", progress=progress)
        batches = [(perturb(images, labels), labels) for images, labels in clean]
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        loss, accuracy = robust_loss(model, batches)
        gradients = {
            name: parameter.grad.detach() for name, parameter in model.named_parameters() if parameter.grad is not None
        }
        bar = tqdm(weights.items(), "sensitivity", unit="layer", disable=None if progress else True, leave=False)
        scores = {}
        for name, weight in bar:
            gradient = gradients.get(f"{name}.weight")
            if gradient is None:  # the forward pass never uses this layer
                scores[name] = 0.0
            elif estimator == "first_order":
                scores[name] = first_order(weight, gradient, epsilon)
            else:
                scores[name] = projected_gradient_ascent(
                    model, weight, gradient, batches, loss=loss, epsilon=epsilon, steps=steps
                )
        settings: dict[str, Any] = {
            "estimator": estimator,
            "epsilon": epsilon,
            "attack": describe(attack, model),
            "max_batches": max_batches,
            "seed": seed,
        }
        if estimator == "pga":
            settings["steps"] = steps
    sizes = {name: weight.numel() for name, weight in weights.items()}
    return Measurement(scores, sizes, gradients, loss, accuracy, sum(len(labels) for _, labels in batches), settings)


def check_settings(*, epsilon: float, estimator: str, steps: int, max_batches: int | None) -> None:
    """Raise `InputError` unless these settings of a measurement are usable."""
    check_number("epsilon", epsilon, low=0)
    check_choice("estimator", estimator, get_args(Estimator))
    check_count("steps", steps)
    if max_batches is not None:
        check_count("max_batches", max_batches)


def measured_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name of each convolutional or linear layer → its weight; a weight that several layers share comes once."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        weight = module.weight if isinstance(module, LAYERS) else None
        if isinstance(weight, nn.Parameter) and not any(weight is other for other in found.values()):
            found[name] = weight
    if not found:
        raise InputError("model: it has no convolutional or linear layer, so there is nothing to measure")
    return found
