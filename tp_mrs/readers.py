"""How much the loss of each image hangs on each channel that a layer reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import LAYERS
from .errors import first_input
from .pruning import width


@contextmanager
def reading(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, each pass forward and backward adds to what this yields: name of each layer → (images, inputs).

    That is the slope of each image's loss ℓ as an input channel of the layer fades: Σ a ∂ℓ/∂a over the values a of that
    channel, wherever else they are read. 0 where no gradient comes.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def begin(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        images = arguments[0]
        for name, layer in layers.items():
            found[name].append(torch.zeros(len(images), width(layer, "in"), device=images.device))

    def watch(name: str, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        values = first_input(layer, arguments)
        if values.requires_grad:
            values.register_hook(partial(note, found[name][-1], layer, values.detach()))

    def note(slopes: Tensor, layer: nn.Module, values: Tensor, gradient: Tensor) -> None:
        products = values.float() * gradient.float()
        if isinstance(layer, nn.modules.conv._ConvNd):
            products = products.flatten(-len(layer.kernel_size)).sum(-1)
        slopes += _by_image(products.reshape(-1, products.shape[-1]), len(slopes))

    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(begin))
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(watch, name)))
        yield found


def _by_image(rows: Tensor, images: int) -> Tensor:
    """(rows, channels) → (images, channels): sums of equal parts; where there are none, what each has on average."""
    if len(rows) % images == 0:
        return rows.reshape(images, -1, rows.shape[-1]).sum(1)
    return (rows.square().sum(0) / images).sqrt().expand(images, -1)
