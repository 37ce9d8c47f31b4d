"""Accuracy with and without attacks, size and speed of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from .attacks import AttackLike, Perturb, bind, named_attack, parse_eps
from .batches import checked_batches, num_outputs
from .borrowing import borrowed
from .errors import DivergenceError, InputError, device_of
from .pruning import count


@dataclass(frozen=True)
class Evaluation:
    """What a model can do, and what it costs.

    Attributes:
        clean: fraction of images classified correctly.
        robust: name of each attack → fraction of attacked images classified correctly.
        images: how many.
        macs: multiply-accumulates for one image, as Torch-Pruning counts them.
        params: number of parameters.
        latency_ms: median time of one image on the model's device, in milliseconds; None if not asked for.
        eps: size of the named attacks' perturbation.
    """

    clean: float
    robust: Mapping[str, float]
    images: int
    macs: int
    params: int
    latency_ms: float | None
    eps: float

    def __str__(self) -> str:
        scores = {"clean": self.clean, **self.robust}
        parts = [f"{name} {value:.1%}" for name, value in scores.items()]
        parts += [f"{self.macs / 1e6:.1f} M MACs", f"{self.params / 1e6:.2f} M params"]
        if self.latency_ms is not None:
            parts.append(f"{self.latency_ms:.2f} ms")
        return ", ".join(parts) + f" ({self.images} images)"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    attacks: Sequence[str | AttackLike] = ("fgsm", "pgd-20"),
    *,
    eps: float | str = 8 / 255,
    max_batches: int | None = None,
    latency: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Measure `model` on `data` in eval mode and full precision; it comes back exactly as it was.

    Args:
        model: returns logits.
        data: iterable of `(images, labels)`: (N, C, H, W) in [0, 1] and (N,). Take it from the test split.
        attacks: names such as `"fgsm"`, `"pgd-20"`, `"cw"`, `"square"`, `"autoattack"`; torchattacks attacks on
            `model`; or factories `model -> attack`. Empty for clean accuracy alone.
        eps: perturbation size of the named ones, in units of the image range; also as text such as `"8/255"`.
        max_batches: use at most so many batches.
        latency: time the model, too; it takes about half a second.
        seed: of the attacks' random starts.
        progress: show a bar on a terminal.

    Raises:
        InputError: an argument or a batch is unusable.
        DivergenceError: the model or an attack returns NaN or infinity.
    """
    eps = parse_eps(eps)
    _check_attacks(attacks, model, eps)
    correct: dict[str, int] = {}
    images_seen, example = 0, None
    with borrowed(model, seed=seed), torch.autocast(device_of(model).type, enabled=False):
        for images, labels in checked_batches(
            model, data, max_batches=max_batches, description="evaluating", progress=progress
        ):
            if example is None:
                example = images[:1]
                perturbs = {"clean": _identity, **_bound(attacks, model, eps, num_outputs(model, example))}
            for name, perturb in perturbs.items():
                logits = _logits(model, perturb(images, labels))
                if not bool(torch.isfinite(logits).all()):
                    raise DivergenceError(f"the model returned NaN or infinity ({name}); are its weights finite?")
                hits = logits.argmax(dim=1) == labels
                correct[name] = correct.get(name, 0) + int(hits.sum())
            images_seen += len(labels)
        assert example is not None  # noqa: S101 (checked_batches raises where there is no batch)
        macs, params = count(model, example)
        milliseconds = measure_latency(model, example) if latency else None
    accuracy = {name: hits / images_seen for name, hits in correct.items()}
    return Evaluation(accuracy.pop("clean"), accuracy, images_seen, macs, params, milliseconds, eps)


def measure_latency(model: nn.Module, images: Tensor, *, seconds: float = 0.3) -> float:
    """Median time of a forward pass over `images` in eval mode, in milliseconds, by `torch.utils.benchmark`."""
    with borrowed(model), torch.no_grad():
        timer = Timer("model(images)", globals={"model": model, "images": images}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def _check_attacks(attacks: Sequence[str | AttackLike], model: nn.Module, eps: float) -> None:
    """Meet unknown names and attacks on other models before the first batch."""
    if isinstance(attacks, str):
        raise InputError(f"attacks: expected a list of attacks, got the text {attacks!r}; write [{attacks!r}]")
    _bound(attacks, model, eps, num_classes=2)


def _bound(attacks: Sequence[str | AttackLike], model: nn.Module, eps: float, num_classes: int) -> dict[str, Perturb]:
    """Label of each attack → the attack, bound to the model."""
    found: dict[str, Perturb] = {}
    for attack in attacks:
        if isinstance(attack, str):
            found[attack] = bind(named_attack(attack, eps=eps, num_classes=num_classes), model)
            continue
        label = getattr(attack, "attack", getattr(attack, "__name__", type(attack).__name__))
        found[label if label not in found else f"{label} ({len(found)})"] = bind(attack, model)
    return found


def _identity(images: Tensor, labels: Tensor) -> Tensor:
    return images


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)
