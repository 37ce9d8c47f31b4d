"""Several processes that each see a part of the data, started by `torchrun` and joined by accelerate or torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from .errors import InputError


def place() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join(*, cpu: bool | None = None) -> PartialState:
    """Join the processes that torchrun has started together, unless the script has done so.

    Args:
        cpu: leave the GPUs alone; None if there are none.

    Raises:
        InputError: accelerate takes them for single ones, and would train each alone.
    """
    state = PartialState(cpu=not torch.cuda.is_available() if cpu is None else cpu)
    if state.num_processes != place()[1]:
        raise InputError(
            f"accelerate sees {state.num_processes} process where there are {place()[1]}; where there is no GPU, make "
            "accelerate.PartialState(cpu=True), or leave it to tp_mrs"
        )
    return state


def share(tensors: Iterable[Tensor]) -> None:
    """Give the tensors of all processes the values that they have in the first one, in place."""
    if place()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all processes, on a device of their backend; the tensor itself if there is one process only."""
    if place()[1] > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def add_up_gradients(model: nn.Module) -> None:
    """Sum the gradients of those parameters that require them over all processes."""
    if place()[1] > 1:
        for parameter in model.parameters():
            if parameter.requires_grad:
                gradient = parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad
                parameter.grad = add_up(gradient)


def gather(value: Any) -> list[Any]:
    """What each process passes, in the order of their numbers."""
    _, count = place()
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value)
    return values


@contextmanager
def failing_together() -> Iterator[None]:
    """If the block fails in one process, let the others fail too, which would wait for it for ever otherwise.

    The block must not wait for other processes itself.

    Raises:
        InputError: in the processes whose own part went well, with what another one met.
    """
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
        raise
    finally:
        failures = gather(None if failure is None else str(failure))
        met = [f"process {number}: {text}" for number, text in enumerate(failures) if text is not None]
        if met and failure is None:
            raise InputError(met[0])
