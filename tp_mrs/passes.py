"""Passes over the training data by all processes together, which can be taken up again where they were left."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from .batches import pairs
from .borrowing import seed_all
from .errors import InputError
from .processes import gather, place
from .randomness import (
    RandomState,
    generator_states,
    generators,
    random_state,
    set_generator_states,
    set_random_state,
)


class Passes:
    """This process's batches, pass after pass.

    The order of a pass follows from the random state at its start, which `start` keeps: `random_state()`, from which a
    shuffling sampler without a generator draws, and workers their seeds; and the states of the loader's generators.
    Several processes start a pass with one state, so that they agree on the order, and then go on with their own.
    """

    def __init__(self, data: Any, *, seed: int, device: torch.device) -> None:
        self.data, self.batches = data, epoch_length(data)
        self.generators = generators(data)
        self.seed, self.device, self.number = seed, device, 0
        self.start: tuple[RandomState, list[Tensor]] = random_state(), generator_states(self.generators)
        self.taken = self.batches
        self._part = _part(data)
        self._iterator: Iterator[tuple[Any, Any]] = iter(())
        if place()[1] > 1:
            set_generator_states(self.generators, gather(self.start[1])[0])

    def __iter__(self) -> Passes:
        return self

    def __next__(self) -> tuple[Any, Any]:
        if self.taken < self.batches:
            return self._take()
        self.number += 1
        own = random_state(self.device)
        if place()[1] > 1:
            seed_all(self.seed + self.number)
        self._open()
        batch = self._take()
        if place()[0] > 0:
            set_random_state(own, self.device)
        return batch

    def seek(self, number: int, taken: int, start: tuple[RandomState, list[Tensor]]) -> None:
        """Go to where `taken` batches of a pass that began at `start` have been seen; they are read and dropped."""
        self.number, self.start, self.taken = number, start, taken
        if taken < self.batches:
            set_random_state(start[0])
            set_generator_states(self.generators, start[1])
            self._open()
            for _ in range(taken):
                self._take()

    def _open(self) -> None:
        self.start = random_state(), generator_states(self.generators)
        self._iterator, self.taken = pairs(self._part), 0

    def _take(self) -> tuple[Any, Any]:
        batch = next(self._iterator, None)
        if batch is None:
            raise InputError(f"train_data: it has a len() of {self.batches}, but yielded only {self.taken} batches")
        self.taken += 1
        over = self.taken == self.batches
        if over and next(self._iterator, None) is not None:  # read to the end, where some samplers draw once more
            raise InputError(f"train_data: it has a len() of {self.batches}, but yielded more batches")
        return batch


def epoch_length(data: Any) -> int:
    """The number of batches of each process in one pass over `data` by all of them.

    Raises:
        InputError: it has no length, cannot be read again, is too short, or has been split between processes already.
    """
    if not isinstance(data, Sized) or isinstance(data, Iterator):
        raise InputError("train_data: expected a DataLoader or a list of (images, labels) batches, which has a len()")
    batches, count = len(data), place()[1]
    if batches == 0:
        raise InputError("train_data: it has no batch; expected at least one (images, labels)")
    if count == 1:
        return batches
    sampler = getattr(data, "sampler", None)
    if isinstance(data, DataLoaderShard | DataLoaderDispatcher) or isinstance(sampler, DistributedSampler):
        raise InputError(
            "train_data: this loader has been split between processes already; pass it as it was before that: each "
            "process takes its part by itself"
        )
    if batches < count:
        raise InputError(
            f"train_data: {batches} batches are too few for {count} processes; use smaller batches or fewer processes"
        )
    return -(-batches // count)


class _Part:
    """Every so many-th of some batches, from this process's number on; the first ones fill up the last round."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole

    def __len__(self) -> int:
        return -(-len(self.whole) // place()[1])

    def __iter__(self) -> Iterator[Any]:
        number, count = place()
        first: list[Any] = []
        index = -1
        for index, batch in enumerate(self.whole):
            if len(first) < count:
                first.append(batch)
            if index % count == number:
                yield batch
        rest = (index + 1) % count
        if 0 < rest <= number:
            yield first[number - rest]


def _part(data: Any) -> Iterable[Any]:
    """This process's part of the data; a `DataLoader` loads nothing else."""
    if place()[1] == 1:
        whole: Iterable[Any] = data
        return whole
    if type(data) is not DataLoader or data.batch_sampler is None:
        return _Part(data)
    replaced = ("dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last")
    names = [name for name in inspect.signature(DataLoader).parameters if name not in replaced and hasattr(data, name)]
    arguments: dict[str, Any] = {name: getattr(data, name) for name in names}
    return DataLoader(data.dataset, batch_sampler=_Part(data.batch_sampler), **arguments)
