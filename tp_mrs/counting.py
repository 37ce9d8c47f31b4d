"""Multiply-accumulates and parameters, as Torch-Pruning counts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch_pruning as tp
from torch import Tensor, nn

from .architectures import LAYERS
from .borrowing import borrowed
from .errors import InputError


class Count(NamedTuple):
    """Of one image: multiply-accumulates, parameters, and the multiply-accumulates of each module that has some."""

    macs: int
    params: int
    by_module: dict[nn.Module, float]


def count(model: nn.Module, example_inputs: Tensor) -> Count:
    """What Torch-Pruning counts, with layers of derived classes counted like those that they derive from.

    Raises:
        InputError: the model cannot be copied, which counting takes.
    """
    with borrowed(model), _derived_layers(model):
        try:
            macs, params, by_module, _ = tp.utils.count_ops_and_params(model, example_inputs[:1], layer_wise=True)
        except RuntimeError as error:
            if "deepcopy" not in str(error):
                raise
            raise InputError(f"model: it cannot be copied, which counting takes: {error}") from error
    return Count(int(macs), int(params), {module: float(each) for module, each in by_module.items() if each})


@contextmanager
def _derived_layers(model: nn.Module) -> Iterator[None]:
    """Torch-Pruning knows layers by their exact types, which timm's padded or standardised convolutions are not."""
    counter = tp.utils.op_counter
    known = counter.MODULES_MAPPING
    derived = {type(module) for module in model.modules() if isinstance(module, LAYERS)} - set(known)
    counter.CUSTOM_MODULES_MAPPING = {
        kind: next(known[base] for base in kind.__mro__ if base in known) for kind in derived
    }
    try:
        yield
    finally:
        counter.CUSTOM_MODULES_MAPPING = {}
