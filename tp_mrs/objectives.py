"""Adversarial training objectives: functions `(model, images, labels, attack) -> loss`.

`attack` is `(images, labels) -> adversarial images` on that model. The model arrives in training mode. Any function
of this form is an objective; those below are known by name to `finetune`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import Perturb
from .errors import InputError

Objective: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Perturb], Tensor]


def standard(model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb) -> Tensor:
    """Cross-entropy on the images as they are: no adversarial training."""
    return F.cross_entropy(model(images), labels)


def adversarial(model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb) -> Tensor:
    """Cross-entropy on attacked images, `CE(f(x'), y)`.

    PGD-AT with PGD (Madry et al., 2018, arXiv 1706.06083); fast AT with FFGSM (Wong et al., 2020, arXiv 2001.03994).
    """
    return F.cross_entropy(model(attack(images, labels)), labels)


def trades(model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb, *, beta: float = 6.0) -> Tensor:
    """`CE(f(x), y) + β KL(f(x) ‖ f(x'))` with x' maximising the second term.

    Source: Zhang et al., 2019, arXiv 1901.08573; β = 6 as there.

    Notes:
        torchattacks' TPGD makes x' in eval mode, and clean and attacked images go through the network as one batch,
        so that BatchNorm sees one mixture of both.
    """
    count = len(images)
    logits = model(torch.cat([images, attack(images, labels)]))
    clean, attacked = logits[:count], logits[count:]
    divergence = F.kl_div(
        F.log_softmax(attacked, dim=1), F.log_softmax(clean, dim=1), log_target=True, reduction="batchmean"
    )
    return F.cross_entropy(clean, labels) + beta * divergence


class Recipe(NamedTuple):
    """An objective and the torchattacks attack it uses unless another is given."""

    objective: Objective
    attack: str


OBJECTIVES: dict[str, Recipe] = {
    "standard": Recipe(standard, "none"),
    "fgsm": Recipe(adversarial, "ffgsm"),
    "pgd": Recipe(adversarial, "pgd-7"),
    "trades": Recipe(trades, "tpgd-7"),
}


def resolve(objective: str | Objective) -> Recipe:
    """The recipe of an objective given by name or as a function; a function gets PGD-7 as its default attack."""
    if callable(objective):
        return Recipe(objective, "pgd-7")
    if objective not in OBJECTIVES:
        raise InputError(
            f"objective: expected one of {', '.join(OBJECTIVES)} or a function "
            f"(model, images, labels, attack) -> loss, got {objective!r}"
        )
    return OBJECTIVES[objective]
