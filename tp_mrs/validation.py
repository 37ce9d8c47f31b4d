"""Accuracy on held-out images while training: robust overfitting is met by keeping the best weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .attacks import AttackLike, bind, build, named_attack
from .batches import check_again, checked_batches, num_classes
from .borrowing import borrowed, seed_all
from .errors import device_of, naming
from .evaluation import correct
from .processes import add_up, failing_together, place


class Validation:
    """Clean and robust accuracy of `model` on held-out data, each process attacking its part.

    Args:
        model: in any mode; it comes back exactly as it was, and so does the random state.
        data: re-iterable, of `(images, labels)`.
        attack: a name, a torchattacks attack on `model`, or a factory.
        eps: perturbation size of an attack given by name.
        seed: of the attack's random starts.

    Raises:
        InputError: an argument or the first batch is unusable; nothing was changed.
    """

    def __init__(
        self, model: nn.Module, data: Iterable[Any], attack: str | AttackLike, *, eps: float, seed: int
    ) -> None:
        check_again("validation_data", data)
        self.model, self.data, self.seed = model, data, seed
        with borrowed(model), naming("validation_data"):
            first, _ = next(checked_batches(model, data, max_batches=1, description="", progress=False))
            classes = num_classes(model, first)
        with naming("validation_attack"):
            made = named_attack(attack, eps=eps, num_classes=classes) if isinstance(attack, str) else attack
            self.attack = build(made, model)
            self._perturb = bind(self.attack, model)

    def __call__(self) -> tuple[float, float]:
        """Fractions of the images classified correctly: clean, and attacked."""
        number, count = place()
        hits = torch.zeros(3, device=device_of(self.model))
        with (
            failing_together(),
            naming("validation_data"),
            borrowed(self.model, seed=self.seed),
            torch.autocast(hits.device.type, enabled=False),
        ):
            batches = checked_batches(self.model, self.data, description="validating", progress=False)
            for index, (images, labels) in enumerate(batches):
                if index % count == number:
                    seed_all(self.seed + index)
                    hits += self._hits(images, labels)
        total, clean, robust = add_up(hits).tolist()
        return clean / total, robust / total

    def _hits(self, images: Tensor, labels: Tensor) -> Tensor:
        """How many images there are, how many are classified correctly, and how many when attacked; (3,)."""
        clean = correct(self.model, images, labels, "validation")
        robust = correct(self.model, self._perturb(images, labels), labels, "validation")
        return torch.stack([torch.tensor(len(labels), device=clean.device), clean.sum(), robust.sum()])
