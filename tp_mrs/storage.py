"""Keep a pruned model: weights in safetensors, everything else as JSON in the same file. Never a pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import tensorfile
from ._version import versions
from .architectures import take_sizes
from .errors import InputError, check_device, check_module
from .hub import weights_file
from .models import normalization, normalize
from .recipes import check_recipe, find_recipe, skeleton
from .shapes import Conv, check_fit, fill, slots


def save_file(model: nn.Module, path: str | Path, *, class_names: Sequence[str] | None = None) -> Path:
    """What `tp_mrs.save` says of one file."""
    check_module(model)
    names = _check_class_names(model, getattr(model, "class_names", None) if class_names is None else class_names)
    tensors = tensors_of(model)
    statistics = normalization(model)
    metadata = {
        "recipe": find_recipe(model),
        "class_names": names,
        "normalize": statistics and {"mean": statistics[0], "std": statistics[1]},
        **untold_sizes(model),
        "versions": versions(),
    }
    return tensorfile.write(path, metadata, tensors)


def load(
    path: str | Path,
    *,
    factory: Callable[[], nn.Module] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Read what `save` wrote: the model with its pruned shapes, in eval mode; or any state dict in safetensors.

    Nothing in the file is run or unpickled, and no file or address that it names is opened. The architecture is first
    made without memory; what is then taken is the size of the file.

    Args:
        path: the file; the folder that holds it as `model.safetensors`; or on the Hugging Face hub
            `hf-hub:owner/name`, or `hf-hub:owner/name@revision`.
        factory: makes the unpruned architecture, for models that timm did not make and files that `save` did not
            write: `load(path, factory=lambda: tp_mrs.create_model("resnet18", ...))`. Such a plain state dict must be
            of the unpruned architecture, as it lacks what more there is to know of a pruned one; and it holds no
            normalisation: let the factory add it.
        device: where to put it.
        dtype: floating-point type to convert it to; None for the types in the file.

    Returns:
        the model; its `class_names` are those it was saved with, if any.

    Raises:
        InputError: no such file, damaged, not safetensors, or it doesn't fit the architecture; or the hub can't be
            reached.
    """
    device = check_device(device)
    if dtype is not None and dtype not in tensorfile.FLOATS:
        raise InputError(f"dtype: expected None or a floating-point type such as torch.float32, got {dtype!r}")
    path = weights_file(path)
    content, tensors = tensorfile.read(path)
    with _naming(path):
        metadata = _Metadata.parse(content or {})
    if factory is None and metadata.recipe is None:
        raise InputError(f"factory: {path} does not say how to make its model; pass factory=lambda: MyModel(...)")
    made = None if factory is None else _made_by(factory)
    with _naming(path):
        model: Any = skeleton(check_recipe(metadata.recipe), tensors=len(tensors)) if made is None else made
        _take_shapes(model, tensors, metadata, complete=made is None, full=content is None)
        if metadata.normalize is not None:
            normalize(model, *metadata.normalize)
    if metadata.class_names is not None:
        model.class_names = metadata.class_names
    if made is not None or device.type != "cpu" or dtype is not None:
        model.to(device=device, dtype=dtype)
    return model.eval()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; raises `InputError` if some state is no plain tensor with values."""
    tensors = {name: slot.tensor for name, slot in slots(model).items() if slot.tensor is not None}
    other = sorted(set(model.state_dict()) - set(tensors))
    if other:
        raise InputError(f"model: {other[0]} of its state is no parameter or buffer, and cannot be saved")
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in tensorfile.TYPES.values():
            what = (
                "is on the meta device and holds no values" if tensor.is_meta else f"is {tensor.layout} {tensor.dtype}"
            )
            raise InputError(f"model: its tensor {name} {what}, and cannot be saved")
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits that tell these tensors' names, types, shapes and values from others'."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())  # as bytes: NumPy has no bfloat16
    return digest.hexdigest()[:16]


def copy_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, for `put_tensors`."""
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give all parameters and buffers these values, of their own shapes, in place."""
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            tensor.copy_(tensors[name])


def untold_sizes(model: nn.Module) -> dict[str, dict[str, int]]:
    """Sizes by name of module that the shapes of the tensors do not tell, for `take_shapes`."""
    modules = list(model.named_modules())
    return {
        "heads": {name: module.num_heads for name, module in modules if _has_heads(module)},
        "groups": {name: module.groups for name, module in modules if isinstance(module, Conv) and module.groups > 1},
        "widths": {name: module.normalized_shape[0] for name, module in modules if _is_bare_norm(module)},
    }


def take_shapes(model: nn.Module, tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> None:
    """Replace the tensors of `model` by copies of `tensors`, as large or smaller; its layers follow.

    Raises:
        InputError: they don't fit; nothing was changed.
    """
    _take_shapes(model, tensors, _Metadata.parse(dict(sizes)), complete=True)


def _take_shapes(
    model: nn.Module, tensors: Mapping[str, Tensor], metadata: _Metadata, *, complete: bool, full: bool = False
) -> None:
    _check_modules(model, metadata)
    places = check_fit(model, tensors, groups=metadata.groups, complete=complete, full=full)
    modules: dict[str, Any] = dict(model.named_modules())
    for name, heads in metadata.heads.items():
        modules[name].num_heads = heads
    for name, width in metadata.widths.items():
        modules[name].normalized_shape = (width,)
    fill(places, tensors, groups=metadata.groups)
    take_sizes(model)


@dataclass(frozen=True)
class _Metadata:
    """What `save` notes beside the tensors; all empty for a plain state dict."""

    recipe: dict[str, Any] | None
    class_names: list[str] | None
    normalize: tuple[list[float], list[float]] | None
    heads: dict[str, int]
    groups: dict[str, int]
    widths: dict[str, int]

    @classmethod
    def parse(cls, content: dict[str, Any]) -> _Metadata:
        """Raise `InputError` unless every entry has the type that `save` gives it."""
        statistics, names = content.get("normalize"), content.get("class_names")
        if statistics is not None:
            if not isinstance(statistics, dict) or not {"mean", "std"} <= set(statistics):
                raise InputError("normalize: expected mean and std")
            statistics = _numbers(statistics["mean"]), _numbers(statistics["std"])
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise InputError("class_names: expected a list of strings")
        counts = (_counts(content, key) for key in ("heads", "groups", "widths"))
        return cls(content.get("recipe"), names, statistics, *counts)


def _numbers(values: object) -> list[float]:
    if isinstance(values, list) and all(type(value) in (int, float) and abs(value) < 1e9 for value in values):
        return values
    raise InputError("normalize: expected lists of numbers")


def _counts(content: dict[str, Any], key: str) -> dict[str, int]:
    counts = content.get(key, {})
    if isinstance(counts, dict) and all(type(count) is int and count > 0 for count in counts.values()):
        return counts
    raise InputError(f"{key}: expected a positive integer for each name")


def _made_by(factory: Callable[[], Any]) -> Any:
    model = factory if isinstance(factory, nn.Module) or not callable(factory) else factory()
    if model is factory or not isinstance(model, nn.Module):
        raise InputError(
            "factory: expected a function that returns a torch.nn.Module, such as lambda: MyModel(...), "
            f"got {type(model).__name__}"
        )
    return model


def _check_modules(model: nn.Module, metadata: _Metadata) -> None:
    """Raise `InputError` if something is noted of modules that don't have it, or more than the architecture's."""
    for name, heads in metadata.heads.items():
        module: Any = _submodule(model, name)
        if not _has_heads(module) or heads > module.num_heads:
            raise InputError(f"heads: the architecture has no {heads} attention heads in {name[:80]!r}")
    for name in metadata.groups:
        if not isinstance(_submodule(model, name), Conv):
            raise InputError(f"groups: the architecture has no convolution {name[:80]!r}")
    for name, width in metadata.widths.items():
        module = _submodule(model, name)
        if not _is_bare_norm(module) or width > module.normalized_shape[0]:
            raise InputError(f"widths: the architecture has no norm of {width} channels in {name[:80]!r}")


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _is_bare_norm(module: Any) -> bool:
    """Whether it is a LayerNorm or the like without weights, whose width no tensor tells."""
    shape = getattr(module, "normalized_shape", None)
    return isinstance(shape, tuple) and len(shape) == 1 and getattr(module, "weight", None) is None


def _has_heads(module: object) -> bool:
    return type(getattr(module, "num_heads", None)) is int


def _check_class_names(model: nn.Module, names: object) -> list[str] | None:
    if names is None:
        return None
    outputs = getattr(model, "num_classes", None)
    count = outputs if type(outputs) is int and outputs > 0 else None
    plain = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not plain or (count is not None and len(names) != count):  # type: ignore[arg-type]
        raise InputError(
            f"class_names: expected a list of {count or 'the'} strings, one for each output, got {str(names)[:80]}"
        )
    return list(names)  # type: ignore[call-overload]


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Start the message of an `InputError` about the file with its name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"path: {path} is unusable, {error}") from error
