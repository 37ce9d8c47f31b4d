"""Where the channels of a tensor have gone, read off numbers that were moved about in their place."""

from __future__ import annotations

from enum import Enum, auto

import torch
from torch import Tensor


class Layout(Enum):
    """How n channels, numbered from 0, lie along an axis."""

    ONCE = auto()
    """0 1 2 3: as they were."""
    TILED = auto()
    """0 1 2 3 0 1 2 3: joined with copies of themselves."""
    INTERLEAVED = auto()
    """0 0 1 1 2 2 3 3: flattened together with the axes behind them."""
    FIRST_HALF = auto()
    """0 1: the first of two chunks."""
    SECOND_HALF = auto()
    """2 3: the second one."""
    HALVES = auto()
    """0 1 at some places and 2 3 at others: both chunks, side by side along another axis."""


def numbered(shape: torch.Size, axis: int, device: torch.device) -> Tensor:
    """A tensor of that shape that holds each element's position along a (negative) axis."""
    return _along(torch.arange(shape[axis], dtype=torch.float64, device=device), axis, shape)


def find_layout(labels: Tensor, width: int) -> tuple[int, Layout] | None:
    """The (negative) axis along which the numbers 0 … width − 1 lie in one of the layouts, and which; None if none."""
    if width < 2:
        return None
    for axis in range(-labels.dim(), 0):
        size = labels.shape[axis]
        for layout, line in _lines(size, width, labels):
            values = labels.remainder(width // 2) if layout is Layout.HALVES else labels
            if torch.equal(values, _along(line, axis, labels.shape)):
                return axis, layout
    return None


def _lines(size: int, width: int, labels: Tensor) -> list[tuple[Layout, Tensor]]:
    """What an axis of that size holds in each layout that fits it."""
    numbers = torch.arange(width, dtype=labels.dtype, device=labels.device)
    if size == width:
        return [(Layout.ONCE, numbers)]
    if size and size % width == 0:
        times = size // width
        return [(Layout.TILED, numbers.repeat(times)), (Layout.INTERLEAVED, numbers.repeat_interleave(times))]
    if 2 * size == width:
        half = numbers[:size]
        return [(Layout.FIRST_HALF, half), (Layout.SECOND_HALF, half + size), (Layout.HALVES, half)]
    return []


def _along(line: Tensor, axis: int, shape: torch.Size) -> Tensor:
    return line.view(-1, *[1] * (-axis - 1)).expand(shape)
