"""Attacks made of torchattacks attacks: restarts, a bound on the size, AutoAttack as it was published."""

from __future__ import annotations

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F
from torchattacks.attack import Attack

from .errors import InputError


class Restarts(Attack):
    """Several runs of an attack with random starts; an image withstands it only if it withstands every run.

    Each image gets the perturbation that fools the model or, where none does, the one of highest loss.
    """

    def __init__(self, attack: Attack, restarts: int) -> None:
        super().__init__(attack.attack, attack.model)
        self.run = attack
        self.restarts = restarts

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        strongest = images.clone()
        losses = torch.full((len(labels),), -torch.inf, device=images.device)
        for _ in range(self.restarts):
            standing = (losses < torch.inf).nonzero().flatten()
            if len(standing) == 0:
                break
            found = self.run(images[standing], labels[standing]).detach()
            loss = self._loss(found, labels[standing])
            higher = loss > losses[standing]
            strongest[standing[higher]], losses[standing[higher]] = found[higher], loss[higher]
        return strongest

    @torch.no_grad()
    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each image, infinite where the model is fooled: no loss tells that where it saturates."""
        logits = self.get_logits(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="none")
        return loss.masked_fill(logits.argmax(dim=1) != labels, torch.inf)


class WithinL2(Attack):
    """An attack that looks for the smallest perturbation, of which only those count that are small enough.

    Images whose perturbation has an L2 norm above `eps` come back as they were: no adversarial was found in that ball.
    """

    def __init__(self, attack: Attack, eps: float) -> None:
        super().__init__(attack.attack, attack.model)
        self.run = attack
        self.eps = eps

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        found = self.run(images, labels).detach()
        inside = (found - images).flatten(1).norm(dim=1) <= self.eps
        return torch.where(inside.view(-1, 1, 1, 1), found, images)


def autoattack(model: nn.Module, *, eps: float, steps: int, num_classes: int) -> Attack:
    """AutoAttack's standard version in the L∞ norm; an image withstands it only if it withstands all four parts.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", arXiv 2003.01690.

    Notes:
        torchattacks' own class leaves its parts at 10 steps and targets all classes; the published ones take 100
        steps, and target the nine most likely other classes.

    Args:
        model: with at least 4 classes, as the loss of targeted APGD compares four logits.
        eps: size of the perturbation.
        steps: of the gradient-based parts.
        num_classes: that the model tells apart.

    Raises:
        InputError: the weights have less than 32 bits; the differences that the attack steers by drown in rounding.
    """
    narrow = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.element_size() < 4}
    if narrow:
        raise InputError(f"model: AutoAttack needs weights in float32, found {', '.join(narrow)}; use model.float()")
    targeted = {"n_classes": min(num_classes, 10)}
    attack = torchattacks.MultiAttack(
        [
            torchattacks.APGD(model, eps=eps, steps=steps),
            torchattacks.APGDT(model, eps=eps, steps=steps, **targeted),
            torchattacks.FAB(model, eps=eps, steps=steps, multi_targeted=True, **targeted),
            torchattacks.Square(model, eps=eps, n_queries=5000),
        ]
    )
    attack.attack = "AutoAttack"
    return attack
