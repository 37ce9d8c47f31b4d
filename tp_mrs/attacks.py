"""torchattacks, made safe to call: named, bound to the right model, and leaving no trace in it."""

from __future__ import annotations

import difflib
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import torch
import torchattacks
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import Tensor, nn
from torchattacks.attack import Attack

from .batches import checked_batches, num_classes
from .borrowing import lent, seed_all
from .composed import Restarts, WithinL2, autoattack
from .errors import DivergenceError, InputError, device_of, naming
from .numerics import culprit
from .processes import place

logger = logging.getLogger(__name__)

AttackFactory: TypeAlias = Callable[[nn.Module], Any]
AttackLike: TypeAlias = "Attack | AttackFactory"
Perturb: TypeAlias = Callable[[Tensor, Tensor], Tensor]

L2_EPS = 128 / 255  # of named attacks in the L2 norm: usual for 32×32 images (RobustBench)
SMALL_L2 = 0.1  # below that, a size in the L2 norm was probably meant for the L∞ norm

_NEEDS_MORE = ("MultiAttack", "LGV")  # cannot be made from a model and a size alone
_TARGETED = (torchattacks.AutoAttack, torchattacks.APGDT)
_BOUNDED_L2 = ("PGDL2", "PGDRSL2")
_SMALLEST_L2 = ("CW", "DeepFool")  # look for the smallest perturbation, however large that is
_ROUNDING = 1e-3  # bfloat16 has three digits
_STEPS = ("steps", "n_queries", "nb_iter")


def bind(attack: AttackLike, model: nn.Module) -> Perturb:
    """Return `perturb(images, labels) -> adversarial images` for `attack` on `model`.

    Training flags, `requires_grad` and `.grad` of the model are as before after each call, also when it raises.

    Args:
        attack: a torchattacks attack built on `model`, or a factory `model -> attack`, such as
            `lambda m: torchattacks.PGD(m, eps=8/255)` or simply `torchattacks.PGD`.
        model: the model under attack.

    Raises:
        InputError: the attack is bound to another model or device, or is no attack at all; from `perturb`: the attack
            needs gradients, and the model's outputs have none.
    """
    built = build(attack, model)
    norm, eps = _size(built)
    if norm == "L2" and eps is not None and 0 < eps < SMALL_L2:
        logger.warning(
            "this %s moves images by %g in the L2 norm, which is next to nothing and usual in the L∞ norm; "
            "in L2, 128/255 is usual",
            _name(built),
            eps,
        )

    def perturb(images: Tensor, labels: Tensor) -> Tensor:
        _check_classes(built, model, images)
        try:
            with lent(model), torch.enable_grad():
                adversarial = built(images.clone(), labels)
        except (RuntimeError, TypeError, IndexError) as error:
            reason = _reason(built, images, labels, str(error))
            if reason is None:
                raise
            raise InputError(reason) from error
        _check_like(images, adversarial, _name(built))
        low, high = torch.stack(torch.aminmax(adversarial.detach())).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DivergenceError(f"attack: {_name(built)} returned NaN or infinity{culprit(model, images)}")
        if low < -_ROUNDING or high > 1 + _ROUNDING:
            raise InputError(
                f"attack: {_name(built)} returned values from {low:.3g} to {high:.3g}; expected images in [0, 1]: "
                "clamp them in its forward()"
            )
        return adversarial.detach()

    return perturb


def attacked_batches(
    model: nn.Module,
    data: Iterable[Any],
    attack: AttackLike,
    *,
    max_batches: int | None,
    seed: int,
    progress: bool,
) -> list[tuple[Tensor, Tensor]]:
    """This process's batches of adversarial images; the random start of each depends on its number alone."""
    number, count = place()
    if count > 1 and isinstance(data, (DataLoaderShard, DataLoaderDispatcher)):
        raise InputError(
            "data: accelerate has prepared this loader, so it gives each process other images, and some of them twice; "
            "pass the loader from before that: each process takes its part by itself"
        )
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


def _check_like(images: Tensor, adversarial: object, name: str) -> None:
    """Raise `InputError` unless an attack has returned images like those that it was given."""
    if isinstance(adversarial, Tensor) and adversarial.shape == images.shape and adversarial.dtype == images.dtype:
        return
    got = type(adversarial).__name__
    if isinstance(adversarial, Tensor):
        got = f"{tuple(adversarial.shape)}, {adversarial.dtype}"
    raise InputError(
        f"attack: expected {name} to return images as it was given them, a tensor {tuple(images.shape)}, "
        f"{images.dtype}, got {got}; correct its forward()"
    )


def _reason(attack: Attack, images: Tensor, labels: Tensor, error: str) -> str | None:
    """What to say of an error of an attack's, if it is known where that comes from."""
    name = _name(attack)
    if "does not require grad" in error:
        return (
            f"model: its outputs have no gradient with respect to the images, which {name} needs; "
            "remove what cuts it off (no_grad, detach, argmax), or attack without gradients: 'square'"
        )
    if "BFloat16" in error and images.dtype == torch.bfloat16:
        return f"model: {name} cannot work in bfloat16; use model.float() and images.float(), or another attack"
    if "BFloat16" in error:
        return f"precision: {name} cannot work in bfloat16; take precision='fp32', or another attack"
    if labels.is_floating_point():
        return f"attack: {name} takes no probabilities for labels, which rslad gives it; take 'pgd-7', or 'ffgsm'"
    return None


def _takes_one(function: Callable[..., Any]) -> bool:
    """Whether it can be called with one argument, as far as its signature tells."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # it has none
        return True
    return True


def build(attack: AttackLike, model: nn.Module) -> Attack:
    """The attack, made if need be, and checked to be one on this model; raises as `bind`."""
    built = attack if isinstance(attack, Attack) else None
    if built is None and callable(attack):
        if not _takes_one(attack):
            raise InputError(
                f"attack: {attack!r:.80} can't be called with the model; pass a factory such as "
                "lambda model: torchattacks.PGD(model, eps=8/255)"
            )
        built = attack(model)
    if not isinstance(built, Attack):
        raise InputError(
            "attack: expected a torchattacks attack or a factory that makes one from a model, such as "
            f"lambda model: torchattacks.PGD(model, eps=8/255); got {attack!r}"
        )
    if built.model is not model:
        raise InputError(
            f"attack: this {_name(built)} is bound to another model; build it on the model you pass, "
            "or pass a factory: lambda model: torchattacks.PGD(model, eps=8/255)"
        )
    if built._normalization_applied is not None:
        raise InputError(
            "attack: set_normalization_used() expects normalised images; here they stay in [0, 1]. "
            "Use tp_mrs.normalize(model, mean, std) instead"
        )
    device = device_of(model)
    if built.device != device:
        raise InputError(
            f"attack: built for {built.device}, but the model is on {device}; "
            f"call attack.set_device({str(device)!r}) or pass a factory"
        )
    norm, eps = _size(built)
    if norm == "Linf" and eps is not None:
        with naming(f"attack: this {_name(built)}'s eps", "eps"):
            parse_eps(eps)
    return built


def _size(attack: Any) -> tuple[str, float | None]:
    """The norm of what is added to an image, L∞ unless an attack says otherwise, and its bound if there is one."""
    eps = getattr(attack, "eps", None)
    if isinstance(eps, str):
        raise InputError(f"attack: this {_name(attack)}'s eps: expected a number, such as 8 / 255, got {eps!r}")
    norm = "L2" if attack.attack in _BOUNDED_L2 else getattr(attack, "norm", "Linf")
    return norm, eps if isinstance(eps, int | float) else None


def _check_classes(attack: Any, model: nn.Module, images: Tensor) -> None:
    """Raise `InputError` if an attack that targets classes was made for another number than the model tells apart.

    It targets them by rank, and beyond the nine most likely other ones there is little to find.
    """
    parts = (attack, *getattr(attack, "attacks", ()))
    targeted = [part for part in parts if isinstance(part, _TARGETED) or getattr(part, "multi_targeted", False)]
    classes = num_classes(model, images) if targeted else 0
    for part in targeted:
        made_for = part.n_classes if hasattr(part, "n_classes") else part.n_target_classes + 1
        if not min(classes, 10) <= made_for <= classes:
            raise InputError(
                f"attack: this {_name(part)} was made for {made_for} classes, but the model has {classes}; "
                f"make it with n_classes={classes}"
            )


@dataclass(frozen=True)
class AttackName:
    """What a name such as `"pgd-20x5"` stands for.

    Attributes:
        kind: torchattacks' class.
        steps: how many (queries, for Square); 1 where the attack takes no such number.
        restarts: runs from different random starts.
    """

    kind: str
    steps: int
    restarts: int


def parse_name(name: str) -> AttackName:
    """Read the name of an attack: a torchattacks class in any case, `-steps` and `xrestarts` behind it if wished.

    >>> parse_name("pgd-20x5")
    AttackName(kind='PGD', steps=20, restarts=5)

    Raises:
        InputError: no attack has that name, or it takes no steps or restarts.
    """
    known = {key.lower(): key for key in torchattacks.__all__ if key not in _NEEDS_MORE} | {"none": "VANILA"}
    match = re.fullmatch(r"([^-]+?)(?:-([^x]*))?(?:x([0-9]+))?", name.lower())
    base, steps, restarts = match.groups() if match else (name.lower().partition("-")[0], None, None)
    if match is None or base not in known:
        dashed = re.sub("(?<=[a-z])(?=[0-9]+$)", "-", base)  # pgd20
        guess = [dashed] if dashed.partition("-")[0] in known else difflib.get_close_matches(base, known, n=1)
        hint = f"did you mean {guess[0]!r}?" if guess else "try 'pgd-20', 'fgsm', 'cw', 'square' or 'autoattack'"
        raise InputError(f"attack: no torchattacks attack is called {name!r}; {hint}")
    kind = known[base]
    default = _default_steps(kind)
    if steps is not None and (default is None or not re.fullmatch("0*[1-9][0-9]*", steps)):
        raise InputError(f"attack: {name!r} has a step count that {kind} does not take; try 'pgd-20'")
    if restarts is not None and (int(restarts) == 0 or not _accepted(kind) & {"random_start", "n_restarts"}):
        raise InputError(f"attack: {name!r} has a number of restarts that {kind} does not take; try 'pgd-20x5'")
    return AttackName(kind, int(steps) if steps else default or 1, int(restarts or 1))


def named_attack(name: str, *, eps: float, num_classes: int | None = None) -> AttackFactory:
    """Return the factory of an attack known by name.

    Args:
        name: a torchattacks class in any case (`"pgd"`, `"ffgsm"`, `"cw"`, `"autoattack"`, …), with the number of
            steps behind a dash (`"pgd-20"`; queries for Square: `"square-1000"`) and of restarts behind an x
            (`"pgd-20x5"`: an image withstands it only if it withstands all five runs) if wished; `"none"` leaves
            images as they are. `"autoattack"` is the published version with 100 steps.
        eps: size of the perturbation in the L∞ norm, in units of the image range [0, 1]. Attacks in the L2 norm have
            a size of their own, `L2_EPS`: it bounds PGDL2 and PGDRSL2, and of what CW and DeepFool find only what is
            no larger counts. Those in other norms (EAD, JSMA, one pixel, …) and noise (GN) have torchattacks' sizes.
        num_classes: what AutoAttack and APGDT need to know; 10 if None.

    Raises:
        InputError: no attack has that name, or it takes no steps or restarts, or needs more classes.
    """
    parsed = parse_name(name)
    kind, accepted = parsed.kind, _accepted(parsed.kind)
    if kind in ("AutoAttack", "APGDT") and num_classes is not None and num_classes < 4:
        raise InputError(
            f"attack: {name!r} needs at least 4 classes, as its loss compares four logits, but the model has "
            f"{num_classes}; try 'apgd-100x5' and 'square'"
        )
    size = L2_EPS if kind in _BOUNDED_L2 else eps
    offered: dict[str, Any] = {
        **dict.fromkeys(("eps", "max_epsilon"), size),
        **dict.fromkeys(_STEPS, parsed.steps),
        "alpha": size * _relative_step(parsed.steps),
        "n_classes": min(num_classes or 10, 10),
        "n_restarts": parsed.restarts,
        "seed": 0,
    }
    arguments = {key: value for key, value in offered.items() if key in accepted}
    if "random_start" in accepted and parsed.restarts > 1:
        arguments["random_start"] = True

    def factory(model: nn.Module) -> Attack:
        if kind == "AutoAttack":
            return autoattack(model, eps=eps, steps=parsed.steps, num_classes=num_classes or 10)
        attack = getattr(torchattacks, kind)(model, **arguments)
        if kind in _SMALLEST_L2:
            return WithinL2(attack, L2_EPS)
        if parsed.restarts > 1 and "n_restarts" not in accepted:
            return Restarts(attack, parsed.restarts)
        return attack

    return factory


def _accepted(kind: str) -> set[str]:
    """Names of the arguments that a torchattacks class takes."""
    return set(inspect.signature(getattr(torchattacks, kind)).parameters)


def _default_steps(kind: str) -> int | None:
    """How many steps or queries it takes unless told; None if it takes no such number."""
    if kind == "AutoAttack":
        return 100
    parameters = inspect.signature(getattr(torchattacks, kind)).parameters
    return next((int(parameters[key].default) for key in _STEPS if key in parameters), None)


def _relative_step(steps: int) -> float:
    """Step size as a fraction of eps: 1/4 from 10 steps on, 2.5/steps below, and 1.25 for one, as in fast AT."""
    return min(max(0.25, 2.5 / steps), 1.25)


def parse_eps(text: str | float) -> float:
    """Read a perturbation size such as `"8/255"`, `"0.03"` or `0.03`.

    >>> parse_eps("8/255") == 8 / 255
    True

    Raises:
        InputError: it is no number, or lies outside [0, 1].
    """
    try:
        if isinstance(text, bool):
            raise TypeError
        value = float(Fraction(text)) if isinstance(text, str) else float(text)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise InputError(f"eps: expected a number or a fraction such as 8/255, got {text!r}") from None
    if not 0 <= value <= 1:
        hint = f"; did you mean {text}/255?" if 1 < value < 256 else ""
        raise InputError(f"eps: expected a value in [0, 1], the range of the images, got {text!r}{hint}")
    return value


def _name(attack: Attack) -> str:
    return str(attack.attack)


def describe(attack: AttackLike, model: nn.Module) -> str:
    """How torchattacks writes the attack down, for settings that go into a report."""
    return repr(build(attack, model))
