"""Keep a pruned model: weights in safetensors, everything else as JSON in the same file. Never a pickle."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ._version import versions
from .borrowing import preserved_rng
from .errors import InputError, check_device
from .files import write_bytes
from .models import create_model, normalization, normalize
from .pruning import refresh

logger = logging.getLogger(__name__)
FORMAT = "tp_mrs.model/1"


def save(model: nn.Module, path: str | Path) -> Path:
    """Write `model`, pruned or not, as one safetensors file.

    The metadata says how timm makes the architecture, the normalisation, and the numbers of attention heads. Make
    models with `tp_mrs.create_model`, which remembers its arguments: timm itself does not. Where the architecture
    cannot be made again from what is known, a warning says so, and `load` needs a factory.

    Args:
        model: any module; stays as it is.
        path: the file, usually `*.safetensors`. It is replaced whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    statistics = normalization(model)
    metadata = {
        "format": FORMAT,
        "recipe": _recipe(model),
        "normalize": statistics and {"mean": statistics[0], "std": statistics[1]},
        "heads": {
            name: module.num_heads
            for name, module in model.named_modules()
            if isinstance(getattr(module, "num_heads", None), int)
        },
        "versions": versions(),
    }
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    return write_bytes(path, safetensors.torch.save(tensors, {"tp_mrs": json.dumps(metadata)}))


def load(
    path: str | Path,
    *,
    factory: Callable[[], nn.Module] | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Read what `save` wrote: the model with its pruned shapes, in eval mode.

    Args:
        path: the file.
        factory: makes the unpruned architecture, for models that timm did not make.
        device: where to put it.

    Raises:
        InputError: no such file, not one of ours, or it doesn't fit the architecture.
    """
    device = check_device(device)
    metadata, tensors = read(path)
    if metadata is None:
        raise InputError(f"path: {path} has no tp_mrs metadata; write it with tp_mrs.save(model, path)")
    recipe = metadata.get("recipe")
    if factory is not None:
        model = factory()
    elif isinstance(recipe, dict) and {"architecture", "num_classes"} <= set(recipe):
        model = create_model(**recipe)
    else:
        raise InputError(f"factory: {path} does not say how to make its model; pass factory=lambda: MyModel(...)")
    fit_shapes(model, tensors, source=str(path))
    model.load_state_dict(tensors)
    for name, heads in metadata.get("heads", {}).items():
        model.get_submodule(name).num_heads = heads
    statistics = metadata.get("normalize")
    if statistics is not None:
        normalize(model, statistics["mean"], statistics["std"])
    return refresh(model).to(device).eval()


def read(path: str | Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The tp_mrs metadata (None if the file has none) and tensors of a safetensors file.

    Raises:
        InputError: it cannot be read, is not safetensors, or is of a later format.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            raw = (file.metadata() or {}).get("tp_mrs")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"path: cannot read {path} as safetensors ({error}); convert other checkpoints with "
            "safetensors.torch.save_file(model.state_dict(), path)"
        ) from error
    if raw is None:
        return None, tensors
    try:
        metadata = json.loads(raw)
    except ValueError as error:
        raise InputError(f"path: the metadata of {path} is not valid JSON ({error})") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else metadata
        raise InputError(f"path: {path} has format {found!r}, this version reads {FORMAT!r}; upgrade tp_mrs")
    return metadata, tensors


def fit_shapes(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Give the modules of `model` the shapes of `tensors`, which may be smaller but must bear the same names.

    Raises:
        InputError: a tensor is missing, superfluous, of another rank, empty, or larger than the architecture's.
    """
    expected = model.state_dict()
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        raise InputError(
            f"path: {source} doesn't fit the architecture (made with other arguments?); "
            f"missing {missing[:3]}, unexpected {extra[:3]} "
            f"({len(missing)} and {len(extra)} in all)"
        )
    for name, tensor in tensors.items():
        full = expected[name].shape
        channels = list(zip(tensor.shape[:2], full[:2], strict=False))
        fits = tensor.shape[2:] == full[2:] and all(0 < size <= most for size, most in channels)
        fits = fits and tensor.dim() == len(full)
        if not fits:
            raise InputError(
                f"path: {name} in {source} has shape {tuple(tensor.shape)}, the architecture's is {tuple(full)}"
            )
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, current in own:
            tensor = tensors.get(prefix + key, current)
            if tensor.shape == current.shape:
                continue
            smaller = torch.empty_like(tensor, device=current.device)
            if isinstance(current, nn.Parameter):
                setattr(module, key, nn.Parameter(smaller, requires_grad=current.requires_grad))
            else:
                setattr(module, key, smaller)
        _follow_shapes(module)


def _follow_shapes(module: nn.Module) -> None:
    """Set the size attributes of a layer by the shape of its weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    shape = tuple(weight.shape)
    if isinstance(module, nn.modules.conv._ConvNd):
        outer, inner = (shape[1], shape[0]) if module.transposed else shape[:2]
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise: one channel per group
            module.groups = shape[0]
        if module.transposed:
            module.in_channels, module.out_channels = inner, outer * module.groups
        else:
            module.in_channels, module.out_channels = inner * module.groups, outer
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = shape[0]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = shape
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = shape[0]


def _recipe(model: nn.Module) -> dict[str, Any] | None:
    """How `create_model` makes this architecture; None if timm did not make it."""
    recipe = getattr(model, "tp_mrs_recipe", None)
    if not isinstance(recipe, dict):
        config = getattr(model, "pretrained_cfg", None)
        architecture = config.get("architecture") if isinstance(config, dict) else None
        if architecture is None:
            return None
        in_chans = getattr(model, "in_chans", 3)
        recipe = {"architecture": architecture, "num_classes": model.num_classes, "in_chans": in_chans}
    with preserved_rng(model):
        again = create_model(**recipe)
    if _structure(again) == _structure(model):
        return recipe
    logger.warning(
        "create_model(**%s) does not make this architecture again, so load() will need factory=; "
        "make the model with tp_mrs.create_model(...) and all its arguments",
        recipe,
    )
    return None


def _structure(model: nn.Module) -> list[tuple[str, str, dict[str, Any]]]:
    """Names, classes and settings of all modules, apart from the sizes that pruning changes."""

    def is_setting(name: str, value: object) -> bool:
        return isinstance(value, (str, bool, float, tuple)) and name not in ("training", "normalized_shape")

    return [
        (name, type(module).__name__, {key: value for key, value in vars(module).items() if is_setting(key, value)})
        for name, module in model.named_modules()
    ]
