"""The errors a user can meet, and the checks that raise them before anything is changed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class InputError(ValueError):
    """An argument is unusable. The message names it, says what was expected, and what to do."""


class DivergenceError(RuntimeError):
    """A loss, gradient or weight stopped being finite while we worked."""


@contextmanager
def naming(argument: str, part: str | None = None) -> Iterator[None]:
    """Start the message of an `InputError` with the name of the user's argument, where a part has its own for it.

    Args:
        argument: such as `"validation_data"`.
        part: what the part calls it; its last word if None: "data: …" becomes "validation_data: …", and with data,
            "images: …" becomes "validation_data: images: …". What begins with any other name stays as it is.
    """
    kind = part or argument.rpartition("_")[2]
    try:
        yield
    except InputError as error:
        subject, _, rest = str(error).partition(": ")
        if subject == kind:
            raise InputError(f"{argument}: {rest}") from error
        if kind == "data" and subject in ("images", "labels"):
            raise InputError(f"{argument}: {error}") from error
        raise


def check_number(name: str, value: float, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """Raise `InputError` unless `value` is a finite number in [low, high], or (low, high] if `open_low`."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if numeric and low <= value <= high and not (open_low and value == low):
        return
    left = "(" if open_low else "["
    bounds = f"{left}{low:g}, {high:g}]" if math.isfinite(high) else f"{'>' if open_low else '>='} {low:g}"
    raise InputError(f"{name}: expected a number {'in ' if math.isfinite(high) else ''}{bounds}, got {value!r}")


def check_count(name: str, value: int, *, low: int = 1) -> None:
    """Raise `InputError` unless `value` is an integer of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InputError(f"{name}: expected an integer >= {low}, got {value!r}")


def check_seed(seed: int) -> None:
    """Raise `InputError` unless `seed` is one that all random generators take."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise InputError(f"seed: expected an integer from 0 to 4294967295, got {seed!r}")


def check_layers(name: str, layers: object, model: nn.Module) -> list[nn.Module]:
    """The layers, as a list. Raises `InputError` unless each is a module of the model."""
    own = {id(module) for module in model.modules()}
    found = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, (nn.Module, str)) else None
    if found is None or any(id(layer) not in own for layer in found):
        got = layers if found is None else next(layer for layer in found if id(layer) not in own)
        raise InputError(f"{name}: expected a list of the model's layers, such as [model.conv1], got {got!r:.80}")
    return found


def check_flag(name: str, value: object) -> None:
    """Raise `InputError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: expected True or False, got {value!r:.80}")


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise `InputError` unless `value` is one of `choices`."""
    options = [str(choice) for choice in choices]  # type: ignore[attr-defined]
    if value in options:
        return
    shown = options if len(options) <= 12 else difflib.get_close_matches(str(value), options, n=5) or options[:5]
    more = "" if len(shown) == len(options) else f", … ({len(options)} in all)"
    quoted = (repr(option) if ", " in option else option for option in shown)
    raise InputError(f"{name}: expected one of {', '.join(quoted)}{more}, got {value!r}")


def check_path(name: str, value: str | Path) -> Path:
    """Return `value` as a path, `~` expanded; raise `InputError` if it is none."""
    try:
        if "\0" in str(value):
            raise TypeError("a path holds no null character")
        return Path(value).expanduser()
    except (TypeError, RuntimeError) as error:  # no text; no such user
        raise InputError(f"{name}: expected a path, as text or pathlib.Path, got {value!r}") from error


def check_device(name: str | torch.device) -> torch.device:
    """Raise `InputError` unless tensors can be put on that device here."""
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: cannot use {str(name)!r} here ({str(error).splitlines()[0]}); try 'cpu'") from error


def check_module(model: object) -> None:
    """Raise `InputError` unless it is a module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def first_input(layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What a layer was called with. Raises `InputError` if that was by keyword, which hooks don't see."""
    if not inputs:
        raise InputError(
            f"model: it calls a {type(layer).__name__} by keyword, as layer(input=x), which can't be followed; change "
            "its forward to layer(x)"
        )
    return inputs[0]


def device_of(model: nn.Module) -> torch.device:
    """The one device that holds the model's parameters."""
    check_module(model)
    devices = {parameter.device for parameter in model.parameters()}
    if not devices:
        raise InputError("model: it has no parameters, so there is nothing to measure or prune")
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise InputError(f"model: expected all parameters on one device, found {names}; move it with model.to(...)")
    device = devices.pop()
    if device.type == "meta":
        raise InputError("model: its parameters are on the meta device and hold no values; load weights first")
    return device


def check_full_precision(name: str, weight: Tensor) -> None:
    """Raise `InputError` if small changes of a weight would be lost in rounding."""
    if weight.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"model: expected weights of torch.float32, {name} has {weight.dtype}; small changes would be lost in "
            "rounding. Use model.float(), and precision='bf16' for speed"
        )


def check_example_inputs(model: nn.Module, example_inputs: Tensor) -> None:
    """Raise `InputError` unless `example_inputs` is an image batch on the model's device."""
    device = device_of(model)
    if not isinstance(example_inputs, Tensor) or example_inputs.dim() != 4 or not example_inputs.numel():
        raise InputError(
            "example_inputs: expected a tensor of shape (N, C, H, W), such as one batch of images; "
            f"got {_describe(example_inputs)}"
        )
    if example_inputs.device != device:
        raise InputError(
            f"example_inputs: on {example_inputs.device}, but the model is on {device}; "
            f"move one of them, e.g. example_inputs.to({str(device)!r})"
        )


def check_batch(images: object, labels: object, *, num_classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Return `(images, labels)`, the latter as int64, if they are float images in [0, 1] and integer class labels.

    Args:
        images: (N, C, H, W), floating point, finite, in [0, 1].
        labels: (N,), integers in 0 … num_classes − 1.
        num_classes: the number of classes; None to check only that labels are not negative.

    Raises:
        InputError: naming `images` or `labels`, what came, and the remedy.
    """
    images, labels = _check_images(images), _check_labels(labels, num_classes)
    if len(images) != len(labels) or len(images) == 0:
        raise InputError(
            f"labels: expected one label per image and at least one image, got {len(labels)} labels "
            f"for {len(images)} images"
        )
    return images, labels


def _check_images(images: object) -> Tensor:
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        raise InputError(
            "images: expected a floating-point tensor of shape (N, C, H, W) with values in [0, 1], "
            f"got {_describe(images)}"
        )
    if not bool(torch.isfinite(images).all()):
        raise InputError("images: found NaN or infinity; expected finite values in [0, 1]")
    low, high = (float(value) for value in torch.aminmax(images)) if images.numel() else (0.0, 0.0)
    if low < 0 or high > 1:
        are_bytes = low >= 0 and high > 2
        remedy = (
            "divide by 255" if are_bytes else "leave normalisation to the model: tp_mrs.normalize(model, mean, std)"
        )
        raise InputError(f"images: expected values in [0, 1], found {low:.3g} to {high:.3g}; {remedy}")
    return images


def _check_labels(labels: object, num_classes: int | None) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        raise InputError(f"labels: expected an integer tensor of shape (N,), got {_describe(labels)}")
    labels = labels.long()
    if labels.numel() == 0:
        return labels
    low, high = (int(value) for value in torch.aminmax(labels))
    if low < 0 or (num_classes is not None and high >= num_classes):
        expected = f"0 to {num_classes - 1} (the model has {num_classes} outputs)" if num_classes else "at least 0"
        raise InputError(f"labels: expected classes {expected}, found {low} to {high}")
    return labels


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:120]
