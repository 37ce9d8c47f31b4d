"""torchattacks, made safe to call: named, bound to the right model, and leaving no trace in it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeAlias

import torch
import torchattacks
from torch import Tensor, nn
from torchattacks.attack import Attack

from .borrowing import lent
from .errors import DivergenceError, InputError, device_of

AttackFactory: TypeAlias = Callable[[nn.Module], Any]
AttackLike: TypeAlias = "Attack | AttackFactory"
Perturb: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_NEEDS_MORE = ("MultiAttack", "LGV")  # cannot be made from a model and a size alone


def bind(attack: AttackLike, model: nn.Module) -> Perturb:
    """Return `perturb(images, labels) -> adversarial images` for `attack` on `model`.

    Training flags, `requires_grad` and `.grad` of the model are as before after each call, also when it raises.

    Args:
        attack: a torchattacks attack built on `model`, or a factory `model -> attack`, such as
            `lambda m: torchattacks.PGD(m, eps=8/255)` or simply `torchattacks.PGD`.
        model: the model under attack.

    Raises:
        InputError: the attack is bound to another model or device, or is no attack at all.
    """
    built = _build(attack, model)

    def perturb(images: Tensor, labels: Tensor) -> Tensor:
        with lent(model), torch.enable_grad():
            adversarial = built(images, labels).detach()
        if not bool(torch.isfinite(adversarial).all()):
            raise DivergenceError(f"attack: {_name(built)} returned NaN or infinity")
        return adversarial

    return perturb


def _build(attack: AttackLike, model: nn.Module) -> Attack:
    built = attack if isinstance(attack, Attack) else None
    if built is None and callable(attack):
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
    return built


def named_attack(name: str, *, eps: float, num_classes: int = 10) -> AttackFactory:
    """Return the factory of an attack known by name.

    Args:
        name: a torchattacks class in any case (`"pgd"`, `"ffgsm"`, `"cw"`, `"autoattack"`, …), with the number of
            steps behind a dash if wished (`"pgd-20"`); `"none"` leaves images as they are.
        eps: size of the perturbation, in units of the image range [0, 1]. Attacks without a bound (CW) ignore it.
        num_classes: what AutoAttack and APGDT need to know.

    Raises:
        InputError: no attack has that name, or it takes no number of steps.
    """
    known = {key.lower(): key for key in torchattacks.__all__} | {"none": "VANILA"}
    base, _, suffix = name.lower().partition("-")
    if base not in known or known[base] in _NEEDS_MORE:
        guess = difflib.get_close_matches(base, known, n=1)
        hint = f"did you mean {guess[0]!r}?" if guess else "try 'pgd-20', 'fgsm', 'cw', 'square' or 'autoattack'"
        raise InputError(f"attack: no torchattacks attack is called {name!r}; {hint}")
    cls = getattr(torchattacks, known[base])
    accepted = inspect.signature(cls).parameters
    if suffix and not (suffix.isdigit() and int(suffix) > 0 and "steps" in accepted):
        raise InputError(f"attack: {name!r} has a step count that {known[base]} does not take; try 'pgd-20'")
    steps = int(suffix) if suffix else accepted["steps"].default if "steps" in accepted else 1
    offered: dict[str, Any] = {
        "eps": eps,
        "alpha": eps * _relative_step(steps),
        "n_classes": num_classes,
        "seed": 0,
    }
    if suffix:
        offered["steps"] = int(suffix)
    arguments = {key: value for key, value in offered.items() if key in accepted}

    def factory(model: nn.Module) -> Attack:
        return cls(model, **arguments)

    return factory


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
    return repr(_build(attack, model))
