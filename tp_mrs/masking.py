"""Signs that an attack failed rather than that the model withstood it: gradient masking.

Sources: Athalye et al., "Obfuscated gradients give a false sense of security", arXiv 1802.00420; Carlini et al., "On
evaluating adversarial robustness", arXiv 1902.06705.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attacks import AttackName, bind, named_attack, parse_name
from .errors import InputError
from .proportions import Outcomes, chance_of_at_least, paired_difference, wilson

SIGNIFICANCE = 0.001  # chance of a warning without a reason, for each pair of attacks: it takes ten images at least
WIDE_GAP = 0.10  # AutoAttack usually leaves 2 to 5 points fewer than PGD; more says that PGD got stuck
MANY_STEPS = 10  # from here on an iterative attack should be stronger than one step, or than queries alone
LARGE_EPS = 0.5  # reaches mid-grey from every image, so that nothing is left to tell images apart by
LARGE_ATTACK = "pgd-20"
BLIND_SHARE = 0.05  # of the images may have no gradient at all
IMAGES = 256  # at most, for the checks that run the model
CHUNK = 32  # of these at a time

_RANK = {"FGSM": 0, "FFGSM": 0, "Square": 0, "SPSA": 0, "BIM": 1, "PGD": 1, "EOTPGD": 1, "APGD": 1, "AutoAttack": 2}
_BLACK_BOX = ("Square", "SPSA")

_REMEDY = (
    "gradients may be masked (arXiv 1802.00420), and robustness less than it seems; trust the lowest accuracy, add "
    "'pgd-50x5', 'square' and 'autoattack', and look for layers that saturate, round or have no gradient"
)


def contradictions(withstood: Mapping[str, Outcomes]) -> tuple[str, ...]:
    """A sentence for each pair of attacks of which the weaker one did better, beyond noise.

    Weaker are: one step (FGSM, FFGSM) and no gradients (Square, SPSA) than ten steps or more of BIM, PGD, EOTPGD or
    APGD; all of these than AutoAttack; and fewer steps and restarts than more of the same attack. Only images count
    that one of the two fools and the other does not (McNemar's test, exact, one-sided, at 0.1%). It also counts if
    AutoAttack leaves at least 10 percentage points fewer images than an iterative attack (95% interval).

    Args:
        withstood: name of each attack, as `named_attack` reads it → for each image, whether the model is still right.
    """
    named = {name: parse_name(name) for name in withstood}
    sentences = []
    for weak, strong in permutations(named, 2):
        if not _is_weaker(named[weak], named[strong]):
            continue
        only_weak = int((~withstood[weak] & withstood[strong]).sum())
        only_strong = int((withstood[weak] & ~withstood[strong]).sum())
        if chance_of_at_least(only_weak, only_strong) < SIGNIFICANCE:
            sentences.append(
                f"{weak} fools the model on {only_weak} images that withstand {strong}, and {strong} on {only_strong} "
                f"that withstand {weak}, but {_why(named[weak], named[strong])}: {_REMEDY}"
            )
        if _RANK[named[strong].kind] == 2 and _RANK[named[weak].kind] == 1:
            gap = paired_difference(withstood[weak], withstood[strong])
            if gap.low > WIDE_GAP:
                sentences.append(
                    f"{strong} leaves {100 * gap.mean:.1f} percentage points fewer images than {weak}, more than the "
                    f"usual few: {_REMEDY}"
                )
    return tuple(sentences)


def _is_weaker(weak: AttackName, strong: AttackName) -> bool:
    """Whether it is known that `weak` should fool the model on fewer images than `strong`."""
    if weak.kind not in _RANK or strong.kind not in _RANK:
        return False
    if weak.kind == strong.kind:
        return weak != strong and weak.steps <= strong.steps and weak.restarts <= strong.restarts
    return _RANK[weak.kind] < _RANK[strong.kind] and strong.steps >= MANY_STEPS


def _why(weak: AttackName, strong: AttackName) -> str:
    """Why the second attack should have been the stronger one."""
    if weak.kind == strong.kind:
        return "more steps and restarts should fool it no less often"
    if _RANK[strong.kind] == 2:
        return "AutoAttack should be the strongest"
    if weak.kind in _BLACK_BOX:
        return "an attack that sees gradients should fool it no less often than one that does not"
    return "many steps should fool it no less often than one"


class Sample:
    """At most `IMAGES` images, spread evenly over however many come, so that data sorted by class does no harm."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.seen, self.stride = 0, 1

    def add(self, images: Tensor, labels: Tensor) -> None:
        if self.kept and images.shape[1:] != self.kept[0][0].shape:
            raise InputError(
                f"masking: expected images of one size, found {tuple(self.kept[0][0].shape)} and "
                f"{tuple(images.shape[1:])}; evaluate each size by itself, or leave masking out"
            )
        for pair in zip(images, labels, strict=True):
            if self.seen % self.stride == 0:
                self.kept.append(pair)
            if len(self.kept) > IMAGES:
                self.kept, self.stride = self.kept[::2], 2 * self.stride
            self.seen += 1

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        images, labels = (torch.stack(tensors) for tensors in zip(*self.kept, strict=True))
        return list(zip(images.split(CHUNK), labels.split(CHUNK), strict=True))


def failures(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[str, ...]:
    """A sentence for each check of gradient-based attacks that `model` fails, though every model should pass.

    - No perturbation is too large to notice: PGD with 20 steps at eps 0.5 leaves the model right on no more images
      than the share of the most frequent label, beyond noise (lower end of Wilson's 99% interval).
    - Gradients are there: the loss has one that is not exactly zero on 95% of the images that the model gets right.

    Args:
        model: borrowed, in eval mode.
        batches: `(images, labels)` on the model's device; images of one size.
    """
    perturb = bind(named_attack(LARGE_ATTACK, eps=LARGE_EPS), model)
    right, blind, standing, seen = 0, 0, 0, []
    for images, labels in batches:
        adversarial = perturb(images, labels)
        with torch.no_grad():
            standing += int((model(adversarial).argmax(dim=1) == labels).sum())
        correct, zero = _without_gradient(model, images, labels)
        right += int(correct.sum())
        blind += int((correct & zero).sum())
        seen.append(labels)
    return (*_too_large_to_withstand(standing, torch.cat(seen)), *_too_few_gradients(blind, right))


def _too_large_to_withstand(standing: int, labels: Tensor) -> list[str]:
    chance = int(labels.bincount().max()) / len(labels)
    if wilson(standing, len(labels), level=0.99)[0] <= chance:
        return []
    return [
        f"{LARGE_ATTACK} at eps {LARGE_EPS:g}, which can turn every image grey, leaves the model right on "
        f"{standing / len(labels):.1%} of {len(labels)} images (chance: {chance:.1%}): {_REMEDY}"
    ]


def _too_few_gradients(blind: int, right: int) -> list[str]:
    if blind <= BLIND_SHARE * right:
        return []
    return [
        f"the loss has a gradient of exactly zero on {blind} of {right} images that the model gets right, so that "
        f"gradient-based attacks cannot start: {_REMEDY}"
    ]


def _without_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each image, whether the model gets it right, and whether the gradient of its loss is exactly zero."""
    images = images.detach().clone().requires_grad_()
    logits = model(images)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)
    return logits.detach().argmax(dim=1) == labels, (gradient == 0).flatten(1).all(dim=1)
