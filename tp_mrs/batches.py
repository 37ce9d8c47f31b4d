"""Read the user's batches: checked, on the model's device, with progress."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .borrowing import lent
from .errors import InputError, check_batch, check_count, device_of


def checked_batches(
    model: nn.Module,
    data: Iterable[Any],
    *,
    max_batches: int | None = None,
    description: str,
    progress: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `(images, labels)` on the model's device; the labels fit the model's outputs.

    Args:
        model: in the mode in which it is to be run.
        data: iterable of `(images, labels)`: (N, C, H, W) in [0, 1] and (N,).
        max_batches: stop after so many.
        description: of the progress bar.
        progress: show it on a terminal.

    Raises:
        InputError: `data` is no iterable of pairs, yields nothing, or holds unusable images or labels.
    """
    if max_batches is not None:
        check_count("max_batches", max_batches)
    device = device_of(model)
    classes: int | None = None
    total = max_batches if max_batches is not None else len(data) if isinstance(data, Sized) else None
    with tqdm(total=total, desc=description, unit="batch", disable=None if progress else True, leave=False) as bar:
        for number, (images, labels) in enumerate(islice(pairs(data), max_batches)):
            with numbered(number):
                images, labels = check_batch(images, labels)
                images, labels = images.to(device), labels.to(device)
                if classes is None:
                    classes = num_outputs(model, images)
                check_batch(images, labels, num_classes=classes)
            yield images, labels
            bar.update()
    if classes is None:
        raise InputError("data: it yielded no batch; expected at least one (images, labels)")


@contextmanager
def numbered(number: int) -> Iterator[None]:
    """Let an `InputError` say in which batch it was found, from 0; of the first one that goes without saying."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error} (batch {number})" if number else str(error)) from error


def extent(data: Any) -> dict[str, Any]:
    """How much there is of `data` and in what portions, JSON to be: tells other data from the same, as far as seen."""
    found: dict[str, Any] = {"batches": len(data)} if isinstance(data, Sized) else {}
    if isinstance(data, DataLoader):
        images = {"images": len(data.dataset)} if isinstance(data.dataset, Sized) else {}
        found |= {**images, "batch_size": data.batch_size, "workers": data.num_workers}
    return {"type": type(data).__name__, **found}


def pairs(data: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """The batches of `data`, each checked to be a pair."""
    if not isinstance(data, Iterable):
        raise InputError(f"data: expected an iterable of (images, labels), such as a DataLoader, got {data!r:.80}")
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise InputError(f"data: expected batches of (images, labels), got {type(batch).__name__}")
        yield batch[0], batch[1]


def check_again(name: str, data: object) -> None:
    """Raise `InputError` unless data can be read more than once."""
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        raise InputError(
            f"{name}: expected (images, labels) that can be read again, such as a DataLoader or a list of batches, "
            f"got {type(data).__name__}"
        )


def num_outputs(model: nn.Module, images: Tensor) -> int:
    """How many classes the model tells apart; `InputError` if it can't run on these images."""
    try:
        with torch.no_grad():
            logits = model(images[:1])
    except (RuntimeError, ValueError, AssertionError) as error:
        weight = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), images)
        alike = images.dtype == weight.dtype
        hint = "" if alike else f"; images are {images.dtype}, weights {weight.dtype}: make both float32 with .float()"
        raise InputError(f"images: the model cannot run on shape {tuple(images.shape)}: {error}{hint}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise InputError("model: expected it to return logits of shape (N, classes)")
    return logits.shape[1]


def num_classes(model: nn.Module, images: Tensor) -> int:
    """`num_outputs` of a model in any mode, found in eval mode so that BatchNorm's statistics stay."""
    with lent(model):
        model.eval()
        return num_outputs(model, images)
