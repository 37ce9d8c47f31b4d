"""Re-estimate BatchNorm statistics, which pruning leaves behind."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from .batches import checked_batches
from .borrowing import borrowed, preserved_buffers, preserved_flags, preserved_rng
from .errors import DivergenceError, InputError, check_flag, check_seed, first_input
from .numerics import culprit


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    variances: bool = True,
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Set the running statistics of all BatchNorm layers to those of `data`; weights stay as they are.

    Pruning takes channels out of every sum, so that activations no longer have the mean and variance that BatchNorm
    learned; accuracy right after pruning can fall to chance for this reason alone. A few hundred images mend it,
    without any training. Clean images serve adversarially trained models as well as attacked ones.

    Layers that made up for what they lost (`compensated_step`) give the best estimate of what they gave before, which
    varies less. To blow it up to variance 1 again costs robustness: pass `variances=False` then.

    Args:
        model: its BatchNorm buffers change, nothing else; a model without BatchNorm is left alone.
        data: iterable of `(images, labels)`: (N, C, H, W) in [0, 1] and (N,). Take it from the training split.
        variances: set them, too; if False, those that were learned stay, and only means are set.
        max_batches: use at most so many batches.
        seed: of dropout, which is active where variances are set.
        progress: show a bar on a terminal.

    Returns:
        The model.

    Raises:
        InputError: an argument or a batch is unusable; nothing was changed.
        DivergenceError: what BatchNorm reads is not finite; nothing was changed.
    """
    check_flag("variances", variances)
    check_seed(seed)
    if not _norms(model):
        return model
    with borrowed(model):
        batches = list(
            checked_batches(model, data, max_batches=max_batches, description="recalibrating", progress=progress)
        )
    with preserved_flags(model), preserved_rng(model, seed), preserved_buffers(model), torch.no_grad():
        (_set_all if variances else _set_means)(model, batches)
        # `_set_all` resets what reads nothing, which is to stay as it was
        read = [norm for norm in _norms(model) if not variances or norm.num_batches_tracked != 0]
        found = {norm: [buffer.clone() for buffer in norm.buffers()] for norm in read}
        if not all(buffer.isfinite().all() for buffers in found.values() for buffer in buffers):
            where = next(filter(None, (culprit(model.eval(), images) for images, _ in batches)), "")
            raise DivergenceError(f"what BatchNorm reads is not finite{where}")
    for norm, buffers in found.items():
        for buffer, value in zip(norm.buffers(), buffers, strict=True):
            buffer.copy_(value)
    return model


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _set_all(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Means and variances, to those of what each layer reads in training; those that read nothing are reset."""
    momenta = {norm: norm.momentum for norm in _norms(model)}
    try:
        update_bn(_without_single_images(batches), model)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"data: BatchNorm has no statistics of a single value ({error}); use larger batches"
        ) from error
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def _set_means(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Means, to those of what each layer reads when the layers before it subtract the mean of the same batch."""
    model.eval()
    found: dict[Any, list[Tensor]] = {norm: [] for norm in _norms(model) if norm.running_mean is not None}

    def note(norm: Any, arguments: tuple[Any, ...]) -> None:
        values = first_input(norm, arguments).transpose(0, 1).flatten(1)
        norm.running_mean.copy_(values.mean(dim=1))
        found[norm].append(norm.running_mean.clone())

    with ExitStack() as hooks:
        for norm in found:
            hooks.enter_context(norm.register_forward_pre_hook(note))
        for images, _ in batches:
            model(images)
    for norm, means in found.items():
        if means:
            norm.running_mean.copy_(torch.stack(means).mean(dim=0))


def _without_single_images(batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The images; one that makes a batch by itself goes with its neighbours, where they are of one shape."""
    found: list[Tensor] = []
    for images, _ in batches:
        if found and 1 in (len(images), len(found[-1])) and found[-1].shape[1:] == images.shape[1:]:
            images = torch.cat([found.pop(), images])
        found.append(images)
    return found
