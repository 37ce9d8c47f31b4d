"""Accuracy with and without attacks, size and speed of a model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .attacks import AttackLike, Perturb, bind, build, named_attack, parse_eps
from .batches import checked_batches, num_outputs
from .borrowing import borrowed, seed_all
from .counting import count
from .errors import DivergenceError, InputError, check_choice, check_flag, check_seed, device_of, naming
from .masking import Sample, contradictions, failures
from .numerics import culprit
from .processes import failing_together, gather, place
from .proportions import Difference, Outcomes, paired_difference, wilson

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What a model can do, and what it costs.

    Attributes:
        clean: fraction of images classified correctly.
        robust: name of each attack → fraction of attacked images classified correctly.
        worst: fraction of images classified correctly, clean and under each of the attacks.
        images: how many.
        macs: multiply-accumulates for one image, as Torch-Pruning counts them.
        params: number of parameters.
        size_bytes: of parameters and buffers in memory.
        latency_ms: median time of one image on the model's device, in milliseconds, on a CPU in one thread; None if not
            asked for.
        eps: size of the named attacks' perturbation.
        outcomes: "clean" and the name of each attack → whether each image was classified correctly, in the order of
            the data: a bit each, as hexadecimal text; `outcome(name)` unpacks it.
        checksum: of the images and labels, whatever the size of the batches.
        warnings: signs that gradients are masked, a sentence each; empty if there are none.
    """

    clean: float
    robust: Mapping[str, float]
    worst: float
    images: int
    macs: int
    params: int
    size_bytes: int
    latency_ms: float | None
    eps: float
    outcomes: Mapping[str, str]
    checksum: str
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{name} {self.accuracy(name):.1%} ({self.interval_text(name)})" for name in self.names]
        parts += [
            f"{self.macs / 1e6:.1f} M MACs",
            f"{self.params / 1e6:.2f} M params",
            f"{self.size_bytes / 1e6:.2f} MB",
        ]
        if self.latency_ms is not None:
            parts.append(f"{self.latency_ms:.2f} ms")
        return ", ".join(parts) + f" ({self.images} images)"

    @property
    def names(self) -> list[str]:
        """Of the accuracies worth showing: clean, each attack's, and the worst case if there are several attacks."""
        return ["clean", *self.robust, *(["worst"] if len(self.robust) > 1 else [])]

    def accuracy(self, name: str) -> float:
        """`clean`, `worst`, or the robust accuracy under the attack `name`."""
        return float(self.outcome(name).mean())

    def outcome(self, name: str) -> Outcomes:
        """Whether each image was classified correctly; (images,).

        Args:
            name: `"clean"`, the name of an attack as in `robust`, or `"worst"` for clean and all attacks at once.
        """
        check_choice("name", name, (*self.outcomes, "worst"))
        if name == "worst":
            return np.logical_and.reduce([self.outcome(each) for each in self.outcomes])
        return _unpacked(self.outcomes[name], self.images)

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval of an accuracy: what it may be on other images of the same kind.

        Args:
            name: as for `outcome`.
            level: confidence.
        """
        return wilson(int(self.outcome(name).sum()), self.images, level)

    def interval_text(self, name: str) -> str:
        """The 95% interval in percent, such as `38.1–44.3`."""
        low, high = self.interval(name)
        return f"{100 * low:.1f}–{100 * high:.1f}"

    def difference(self, other: Evaluation, name: str = "worst", level: float = 0.95) -> Difference:
        """This model's accuracy less the other's, on the same images, as `(mean, low, high)`.

        The interval is Bonett and Price's for paired proportions (2012), see `proportions.paired_difference`: images
        on which both are right or both are wrong don't blur it, so that it is far narrower than two intervals apart.

        Args:
            other: an evaluation on the same images in the same order, under the same attacks.
            name: as for `outcome`.
            level: confidence.

        Raises:
            InputError: the images, labels or attacks are others, or no such accuracy was measured.
        """
        if other.checksum != self.checksum:
            raise InputError(
                f"other: made on other images, labels or another order ({other.images} images, checksum "
                f"{other.checksum[:8]}, here {self.images}, {self.checksum[:8]}); evaluate both on the same data, "
                "without shuffling"
            )
        if name != "clean" and other.eps != self.eps:
            raise InputError(
                f"other: attacked with eps {other.eps:g}, here {self.eps:g}; evaluate both with the same eps"
            )
        if name == "worst" and set(other.robust) != set(self.robust):
            raise InputError(
                f"other: attacked by {', '.join(other.robust) or 'none'}, here by {', '.join(self.robust) or 'none'}; "
                "evaluate both under the same attacks"
            )
        return paired_difference(self.outcome(name), other.outcome(name), level)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Evaluation:
        """What `to_dict` gave, or `tp-mrs evaluate --json`, which adds to it."""
        own = {field.name: content[field.name] for field in fields(cls)}
        return cls(**{**own, "warnings": tuple(content["warnings"])})


def comparison(rows: Mapping[str, Evaluation]) -> tuple[dict[str, list[tuple[str, str]]], dict[str, list[str]]]:
    """Each accuracy in percent, with its interval; and each quantity, with its unit in the name."""
    evaluations = list(rows.values())
    accuracies = {name: [accuracy_text(each, name) for each in evaluations] for name in evaluations[0].names}
    sizes = {
        "MACs (M)": [f"{each.macs / 1e6:.1f}" for each in evaluations],
        "params (M)": [f"{each.params / 1e6:.3f}" for each in evaluations],
        "MB": [f"{each.size_bytes / 1e6:.2f}" for each in evaluations],
    }
    if evaluations[0].latency_ms is not None:
        sizes["ms, one image, one thread"] = [f"{each.latency_ms or 0:.2f}" for each in evaluations]
    return accuracies, sizes


def accuracy_text(evaluation: Evaluation, name: str) -> tuple[str, str]:
    """An accuracy in percent, and its 95% interval."""
    return f"{100 * evaluation.accuracy(name):.1f}", evaluation.interval_text(name)


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    attacks: Sequence[str | AttackLike] = ("fgsm", "pgd-20"),
    *,
    eps: float | str = 8 / 255,
    max_batches: int | None = None,
    masking: bool = False,
    latency: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Measure `model` on `data` in eval mode and full precision; it comes back exactly as it was.

    What one attack finds does not depend on the others in the list: each starts from the same random state. Signs of
    gradient masking are logged as warnings, and kept in the result: a weaker attack that does better than a stronger
    one, beyond noise (`masking.contradictions`), and with `masking`, perturbations that are too large to be withstood
    (`masking.failures`).

    Args:
        model: returns logits.
        data: iterable of `(images, labels)`: (N, C, H, W) in [0, 1] and (N,). Take it from the test split, unshuffled
            to compare evaluations (`Evaluation.difference`).
        attacks: names such as `"fgsm"`, `"pgd-20"`, `"pgd-20x5"` (5 restarts), `"cw"`, `"square"`, `"autoattack"`;
            torchattacks attacks on `model`; or factories `model -> attack`. Empty for clean accuracy alone.
        eps: size of the named ones in the L∞ norm, in units of the image range; also as text such as `"8/255"`. Named
            attacks in the L2 norm (`"pgdl2"`, `"cw"`, `"deepfool"`) have 128/255 instead; for other sizes pass a
            factory such as `lambda m: torchattacks.PGDL2(m, eps=1.0)`.
        max_batches: use at most so many batches.
        masking: also attack up to 256 of the images, which must be of one size, with PGD at eps 0.5, and look for
            gradients that are exactly zero.
        latency: time the model, too; it takes about half a second.
        seed: of the attacks' random starts.
        progress: show a bar on a terminal.

    Raises:
        InputError: an argument or a batch is unusable.
        DivergenceError: the model or an attack returns NaN or infinity.

    Notes:
        Where torch.distributed is running, each process attacks its part of the batches, and all get the same result,
        that of one process; the first one times the model. Every process must be given the same model and all of the
        same `data`, in the same order.
    """
    eps = parse_eps(eps)
    check_flag("masking", masking)
    check_flag("latency", latency)
    check_seed(seed)
    _check_attacks(attacks, model, eps)
    number, processes = place()
    hits: dict[str, dict[int, Tensor]] = {}
    checksum, sample, example = _Checksum(), Sample(), None
    with borrowed(model, seed=seed), torch.autocast(device_of(model).type, enabled=False):
        with failing_together():
            for index, (images, labels) in enumerate(
                checked_batches(model, data, max_batches=max_batches, description="evaluating", progress=progress)
            ):
                if example is None:
                    example = images[:1]
                    perturbs = _bound(attacks, model, eps, num_outputs(model, example))
                    hits = {name: {} for name in perturbs}
                checksum.update(images, labels)
                if masking:
                    sample.add(images, labels)
                if index % processes != number:
                    continue
                for name, perturb in perturbs.items():
                    seed_all(seed + index)
                    hits[name][index] = correct(model, perturb(images, labels), labels, name)
        assert example is not None  # noqa: S101 (checked_batches raises where there is no batch)
        outcomes = _gathered(hits)
        counted = count(model, example)
        milliseconds = gather(measure_latency(model, example) if latency and number == 0 else None)[0]
        failed = failures(model, sample.batches()) if masking else ()
    named = {attack: outcomes[attack] for attack in attacks if isinstance(attack, str)}
    warnings = (*contradictions(named), *failed)
    for sentence in warnings:
        logger.warning("%s", sentence)
    accuracy = {name: float(outcome.mean()) for name, outcome in outcomes.items()}
    return Evaluation(
        clean=accuracy.pop("clean"),
        robust=accuracy,
        worst=float(np.logical_and.reduce(list(outcomes.values())).mean()),
        images=len(outcomes["clean"]),
        macs=counted.macs,
        params=counted.params,
        size_bytes=size_in_bytes(model),
        latency_ms=milliseconds,
        eps=eps,
        outcomes={name: _packed(outcome) for name, outcome in outcomes.items()},
        checksum=checksum.hexdigest(),
        warnings=warnings,
    )


def size_in_bytes(model: nn.Module) -> int:
    """Memory that parameters and buffers take; shared ones count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def measure_latency(model: nn.Module, images: Tensor, *, seconds: float = 0.3) -> float:
    """Median time of a forward pass over `images` in eval mode, in milliseconds, by `torch.utils.benchmark`.

    On a CPU in one thread: several wait for each other, for ever so long where other processes are at work.
    """
    from torch.utils.benchmark import Timer  # warns where there is nvcc but no GPU

    with borrowed(model), torch.no_grad():
        timer = Timer("model(images)", globals={"model": model, "images": images}, num_threads=1)
        return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def _check_attacks(attacks: Sequence[str | AttackLike], model: nn.Module, eps: float) -> None:
    """Meet unknown names and attacks on other models before the first batch."""
    if isinstance(attacks, str):
        raise InputError(f"attacks: expected a list of attacks, got the text {attacks!r}; write [{attacks!r}]")
    if not isinstance(attacks, Iterable):
        raise InputError(f"attacks: expected a list of attacks, such as ['pgd-20'], got {attacks!r:.80}")
    with naming("attacks", "attack"):
        for attack in attacks:
            build(named_attack(attack, eps=eps) if isinstance(attack, str) else attack, model)


def _bound(attacks: Sequence[str | AttackLike], model: nn.Module, eps: float, num_classes: int) -> dict[str, Perturb]:
    """Label of each attack → the attack, bound to the model; first of all "clean", which changes nothing."""
    found: dict[str, Perturb] = {"clean": _identity}
    for attack in attacks:
        if isinstance(attack, str):
            found[attack] = bind(named_attack(attack, eps=eps, num_classes=num_classes), model)
            continue
        built = build(attack, model)
        label, taken = str(built.attack), {*found, "worst", *(name for name in attacks if isinstance(name, str))}
        found[label if label not in taken else f"{label} ({len(found) - 1})"] = bind(built, model)
    return found


def _gathered(hits: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Outcomes]:
    """What all processes found for each attack, (images,), from each one's number of batch → outcomes."""
    found = gather({name: {index: hit.cpu().numpy() for index, hit in own.items()} for name, own in hits.items()})
    outcomes = {}
    for name in hits:
        batches = {index: hit for part in found for index, hit in part[name].items()}
        outcomes[name] = np.concatenate([batches[index] for index in sorted(batches)])
    return outcomes


def _identity(images: Tensor, labels: Tensor) -> Tensor:
    return images


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor, name: str) -> Tensor:
    """Whether each image is classified correctly; (N,)."""
    logits = model(images)
    if not bool(torch.isfinite(logits).all()):
        raise DivergenceError(f"the model returned NaN or infinity ({name}){culprit(model, images)}")
    return logits.argmax(dim=1) == labels


class _Checksum:
    """Of images and labels as they come, the same for batches of any size."""

    def __init__(self) -> None:
        self.images, self.labels = hashlib.sha256(), hashlib.sha256()

    def update(self, images: Tensor, labels: Tensor) -> None:
        for image in images.detach().float().cpu().contiguous():
            self.images.update(str(tuple(image.shape)).encode() + image.numpy().tobytes())
        self.labels.update(labels.cpu().numpy().tobytes())

    def hexdigest(self) -> str:
        return hashlib.sha256(self.images.digest() + self.labels.digest()).hexdigest()[:32]


def _packed(outcome: Outcomes) -> str:
    return np.packbits(outcome).tobytes().hex()


def _unpacked(text: str, images: int) -> Outcomes:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=images).astype(np.bool_)
