"""Re-estimate BatchNorm statistics, which pruning leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from .batches import checked_batches
from .borrowing import borrowed, preserved_flags, preserved_rng
from .errors import InputError, check_seed


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
    with preserved_flags(model), preserved_rng(model, seed), _all_or_nothing(model), torch.no_grad():
        try:
            update_bn(_without_single_images(batches), model)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"data: BatchNorm has no statistics of a single value ({error}); use larger batches"
            ) from error
    return model


def _without_single_images(batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The images; one that makes a batch by itself goes with its neighbours, where they are of one shape."""
    found: list[Tensor] = []
    for images, _ in batches:
        if found and 1 in (len(images), len(found[-1])) and found[-1].shape[1:] == images.shape[1:]:
            images = torch.cat([found.pop(), images])
        found.append(images)
    return found


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If the block fails, BatchNorm's buffers and momenta are what they were."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta, before = [norm.momentum for norm in norms], copy.deepcopy([dict(norm.named_buffers()) for norm in norms])
    try:
        yield
    except BaseException:
        for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
        raise
