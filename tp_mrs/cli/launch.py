"""The command line in several processes, which `torchrun` has started: how they join, and which one speaks."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist

from tp_mrs.errors import InputError, check_device
from tp_mrs.processes import join, place

_FAILURES = "tp_mrs/failures"  # a counter in the store that the processes share


class _Nowhere(io.TextIOBase):
    """Takes all that is written; a log handler may hold it for as long as it likes."""

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def one_voice() -> Iterator[None]:
    """Send what other processes than the first one print and show to nowhere."""
    with ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":
            stack.enter_context(redirect_stdout(_Nowhere()))
            stack.enter_context(redirect_stderr(_Nowhere()))
        yield


@contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """This process's device; the processes that torchrun has started are joined for the block.

    Args:
        device: `auto`, `cpu` or `cuda`; for a single process any of torch's.

    Raises:
        InputError: no such device here, or more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else check_device(device)
        return
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device: each process takes its own; expected auto, cpu or cuda, got {device!r}")
    if device == "cuda":
        check_device(device)
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device != "cpu" and 0 < gpus < local:
        raise InputError(f"device: {gpus} GPUs are too few for {local} processes; start fewer, or give --device cpu")
    with _stdout_to_stderr():
        state = join(cpu=device == "cpu" or gpus == 0)
    yield state.device
    state.destroy_process_group()


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send to standard error what libraries write to the file of standard output: Gloo tells there who is connected."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def first_one_first(*, needed: bool = True) -> Iterator[None]:
    """If `needed`, let the other processes wait until the first one has been through the block."""
    waiting = needed and place()[1] > 1
    if waiting and place()[0] > 0:
        dist.barrier()
    yield
    if waiting and place()[0] == 0:
        dist.barrier()


def first_to_fail() -> bool:
    """Whether to say why this process fails: not if another one has said so.

    Before the processes have joined, all fail alike, and the first one speaks.
    """
    if place()[1] == 1:
        return os.environ.get("RANK", "0") == "0"
    return _failures(1) == 1


def another_failed() -> bool:
    """Whether it was another process's failure that a broken connection tells of."""
    return place()[1] > 1 and _failures(0) > 0


def _failures(more: int) -> int:
    """How many processes have failed, after adding some."""
    return int(dist.distributed_c10d._get_default_store().add(_FAILURES, more))
