"""The random state of a process as tensors, which a file can keep."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

RandomState: TypeAlias = dict[str, Tensor]


def random_state(device: torch.device | None = None) -> RandomState:
    """Of Python, NumPy and torch, and of `device` if that is a CUDA device."""
    _, words, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    _, keys, *rest = legacy
    state = {
        "python": torch.tensor([*words, torch.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), *rest], dtype=torch.float64),  # 32-bit integers are exact in float64
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: RandomState, device: torch.device | None = None) -> None:
    """Go on from what `random_state` returned."""
    *words, gauss = state["python"].tolist()
    random.setstate((3, tuple(int(word) for word in words), None if gauss != gauss else gauss))
    *keys, position, has_gauss, cached = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"].clone())
    if "cuda" in state and device is not None:
        torch.cuda.set_rng_state(state["cuda"].clone(), device)


def generators(*sources: Iterable[Any] | None) -> list[torch.Generator]:
    """The random generators that `DataLoader`s draw their order and their workers' seeds from, each once."""
    found: dict[int, torch.Generator] = {}
    for source in sources:
        batches = getattr(source, "batch_sampler", None)
        for holder in (source, getattr(source, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                found.setdefault(id(generator), generator)
    return list(found.values())


def generator_states(found: Iterable[torch.Generator]) -> list[Tensor]:
    """Their states, for `set_generator_states`."""
    return [generator.get_state() for generator in found]


def set_generator_states(found: Iterable[torch.Generator], states: Iterable[Tensor]) -> None:
    """Let each generator go on from its state."""
    for generator, state in zip(found, states, strict=True):
        generator.set_state(state.clone())


@contextmanager
def preserved_generators(*sources: Iterable[Any] | None) -> Iterator[None]:
    """Keep the states of the generators that `DataLoader`s draw from."""
    found = generators(*sources)
    states = generator_states(found)
    try:
        yield
    finally:
        set_generator_states(found, states)
