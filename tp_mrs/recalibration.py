"""Re-estimate BatchNorm statistics, which pruning leaves behind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from .batches import checked_batches
from .borrowing import borrowed, preserved_flags, preserved_rng
from .errors import check_seed


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Set the running statistics of all BatchNorm layers to those of `data`; weights stay as they are.

    Pruning takes channels out of every sum, so that activations no longer have the mean and variance that BatchNorm
    learned; accuracy right after pruning can fall to chance for this reason alone. A few hundred images mend it,
    without any training. Clean images serve adversarially trained models as well as attacked ones.

    Args:
        model: its BatchNorm buffers change, nothing else; a model without BatchNorm is left alone.
        data: iterable of `(images, labels)`: (N, C, H, W) in [0, 1] and (N,). Take it from the training split.
        max_batches: use at most so many batches.
        seed: of dropout, which is active meanwhile.
        progress: show a bar on a terminal.

    Returns:
        The model.

    Raises:
        InputError: `seed` or a batch is unusable; nothing was changed.
    """
    check_seed(seed)
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return model
    with borrowed(model):
        batches = list(
            checked_batches(model, data, max_batches=max_batches, description="recalibrating", progress=progress)
        )
    with preserved_flags(model), preserved_rng(model, seed), torch.no_grad():
        update_bn(batches, model)
    return model
