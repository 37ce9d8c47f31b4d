"""Borrow the user's model and give it back exactly as it came, exceptions included."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import InputError


@contextmanager
def borrowed(model: nn.Module, *, seed: int | None = None) -> Iterator[None]:
    """Lend `model` for measuring: eval mode inside, everything as before outside.

    Kept: each module's training flag and hooks, each parameter's `requires_grad` and `.grad`, the buffers' values, and
    the random state of Python, NumPy and torch. Inside, every `.grad` is None, gradients are enabled, and the random
    generators start from `seed` if one is given. Weights are not copied: who changes them puts them back.

    Raises:
        InputError: `torch.inference_mode` is on, under which there are no gradients.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("torch.inference_mode: gradients are needed here; call this outside of it")
    with (
        preserved_flags(model),
        preserved_buffers(model),
        preserved_caches(model),
        preserved_hooks(model),
        preserved_rng(model, seed),
        torch.enable_grad(),
    ):
        model.eval()
        yield


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. Raises `InputError` if the model holds what can't be copied, as old-style `weight_norm` does."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"model: it cannot be copied, so nothing can be tried on it: {error}") from error


@contextmanager
def preserved_flags(model: nn.Module) -> Iterator[None]:
    """Keep every module's training flag and every parameter's `requires_grad` and `.grad`, which is None inside."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextmanager
def thawed(model: nn.Module) -> Iterator[None]:
    """Let every parameter require its gradient."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def still_frozen(model: nn.Module) -> Iterator[None]:
    """Parameters that don't require a gradient are so afterwards, though pruning makes new ones of them."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Keep the values of all buffers, such as BatchNorm's running statistics."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def preserved_caches(model: nn.Module) -> Iterator[None]:
    """Keep what timm's attention remembers of its biases between forward passes in eval mode.

    It would outlast a change of the weights, and carry autograd's graph, which can't be copied.
    """
    modules: Iterator[Any] = model.modules()
    caches = [(module, module.attention_bias_cache) for module in modules if hasattr(module, "attention_bias_cache")]
    for module, _ in caches:
        module.attention_bias_cache = {}
    try:
        yield
    finally:
        for module, cache in caches:
            module.attention_bias_cache = cache


@contextmanager
def preserved_hooks(model: nn.Module) -> Iterator[None]:
    """Keep the hooks around forward passes; Torch-Pruning leaves its own behind where its trace fails."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    before = [(hooks, set(hooks)) for module in model.modules() for hooks in (getattr(module, name) for name in names)]
    try:
        yield
    finally:
        for hooks, keys in before:
            for key in hooks.keys() - keys:
                del hooks[key]


@contextmanager
def preserved_rng(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Keep the random state of Python, NumPy, torch and the model's CUDA devices; start from `seed` if given."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                seed_all(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_all(seed: int) -> None:
    """Start the random generators of Python, NumPy and torch from `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """Keep training flags and parameters' gradients untouched while an attack runs; cheap enough for every batch.

    torchattacks restores training mode with one top-level `.train()`, which thaws frozen layers, and not at all after
    an exception; CW calls `.backward()`, which would add to every parameter's `.grad`.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)
