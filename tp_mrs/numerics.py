"""Precision and memory format in which a model is run, and what to do about numbers that are not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .errors import check_choice, device_of

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]


def check_precision(precision: object) -> None:
    """Raise `InputError` unless it is one that we know."""
    check_choice("precision", precision, get_args(Precision))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which to run the model."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def first_non_finite(model: nn.Module, images: Tensor) -> str | None:
    """Name of the first module whose output holds NaN or infinity; None if none does."""
    found: list[str] = []

    def looking(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(looking(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def culprit(model: nn.Module, images: Tensor) -> str:
    """The end of a sentence that tells of NaN or infinity: the module where it begins, if it is the model's."""
    name = first_non_finite(model, images)
    if name is None:
        return ""
    return f": {name or 'the model'} is the first module to return NaN or infinity; are its weights finite?"


@contextmanager
def in_channels_last(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Weights in channels_last inside, if `wanted` and safe, and in their own memory and format again outside.

    On x86 CPUs oneDNN writes past its workspace in the backward pass of strided 1×1 convolutions in this layout if they
    have fewer input channels than its block of 16 (uxlfoundation/oneDNN issue 6035). Pruned shortcuts often do.
    """
    narrow = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < 16
    ]
    if wanted and narrow and device_of(model).type == "cpu":
        logger.warning("channels_last is not safe on a CPU for %s (oneDNN issue 6035); going on without it", narrow[0])
        wanted = False
    kernels = [parameter for parameter in model.parameters() if wanted and parameter.dim() == 4]
    before = [(kernel, kernel.data) for kernel in kernels]
    for kernel in kernels:
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for kernel, own in before:
            own.copy_(kernel.data)
            kernel.data = own
