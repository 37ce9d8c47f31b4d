"""The recipe of a timm model: arguments of `create_model` that make its architecture again, without its weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .borrowing import preserved_rng
from .errors import InputError
from .models import WEIGHT_SOURCES, create_model
from .shapes import check_fit, slots

logger = logging.getLogger(__name__)

MOST_VALUES, MOST_DEPTH, LARGEST_SUM, LARGEST_IMAGE = 1_000, 5, 200_000, 1_024
"""What a recipe may have: values in a list, depth of lists, sum of numbers, pixels a side: bounds of timm's loops."""


def find_recipe(model: nn.Module) -> dict[str, Any] | None:
    """Arguments with which `create_model` makes this architecture again; None, with a warning, if they don't."""
    recipe = getattr(model, "tp_mrs_recipe", None)
    if not isinstance(recipe, dict):
        config = getattr(model, "pretrained_cfg", None)
        architecture = config.get("architecture") if isinstance(config, dict) else None
        if architecture is None:
            return None
        in_chans = getattr(model, "in_chans", 3)
        recipe = {"architecture": architecture, "num_classes": getattr(model, "num_classes", 0), "in_chans": in_chans}
    tensors = {name: slot.tensor for name, slot in slots(model).items() if slot.tensor is not None}
    try:
        check_recipe(recipe)
        with preserved_rng(model):
            again = skeleton(recipe, tensors=len(tensors))
        check_fit(again, tensors, complete=True)
        _check_state(again)
        differs = "" if _structure(again) == _structure(model) else "other layers or settings"
    except InputError as error:
        differs = str(error)
    if not differs:
        return recipe
    logger.warning(
        "create_model(**%s) does not make this architecture again (%s), so load() will need factory=; "
        "make the model with tp_mrs.create_model(...) and all its arguments",
        recipe,
        differs,
    )
    return None


def check_recipe(recipe: object) -> dict[str, Any]:
    """Return `recipe` if it can only make an architecture, of bounded size: no files, no downloads, no weights.

    Raises:
        InputError: it is no dictionary of plain values, names a source of weights, or is beyond the bounds.
    """
    if not isinstance(recipe, dict) or not {"architecture", "num_classes"} <= set(recipe):
        raise InputError("recipe: expected a dictionary with architecture, num_classes and further arguments")
    if not isinstance(recipe["architecture"], str) or not re.fullmatch(r"\w+(\.\w+)?", recipe["architecture"]):
        raise InputError(f"recipe: {str(recipe['architecture'])[:80]!r} is not the plain name of a timm architecture")
    sources = sorted(WEIGHT_SOURCES & set(recipe))
    if sources:
        raise InputError(f"recipe: {sources[0]} says where to get weights from; they come from the file alone")
    values = list(_values(recipe))
    for value in values:
        if isinstance(value, str) and not re.fullmatch(r"[\w .+-]{0,64}", value):
            raise InputError(f"recipe: {value[:80]!r} is not a timm option")
    total = sum(min(abs(value), 2 * LARGEST_SUM) for value in values if isinstance(value, (int, float)))
    sizes = [size for key in ("img_size", "image_size") for size in _values(recipe.get(key)) if isinstance(size, int)]
    if not total <= LARGEST_SUM or max(sizes, default=0) > LARGEST_IMAGE:  # NaN is beyond, too
        raise InputError("recipe: its sizes are beyond any timm model's; if they are meant, pass factory=")
    return recipe


def skeleton(recipe: dict[str, Any], *, tensors: int) -> nn.Module:
    """The architecture on the meta device: no memory, no random numbers of torch's, no initialisation.

    Args:
        recipe: arguments of `create_model` that `check_recipe` has accepted.
        tensors: how many tensors there are to fill it; bounds the work.

    Raises:
        InputError: timm cannot make it, or it has far more layers than there are tensors.
    """
    with _Skeleton(calls=2_000 + 100 * tensors):
        return create_model(**recipe)


def _check_state(model: nn.Module) -> None:
    """Raise `InputError` if the model keeps tensors where a state dict does not look, which `load` could not fill."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                raise InputError(f"{name}.{key} is a tensor, but no parameter or buffer")


class _Skeleton(TorchFunctionMode):
    """Tensors are made on the meta device and not filled. In the current thread only, for at most so many calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self.left -= 1
        if self.left < 0:
            raise InputError("recipe: it makes far more layers than the file has tensors")
        if getattr(func, "__name__", "") in _FILL:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        if func in _MAKE and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


# fmt: off
_FILL = {
    "normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_",
    "xavier_uniform_", "orthogonal_", "dirac_", "eye_", "constant_", "ones_", "zeros_", "fill_", "zero_", "copy_",
    "mul_", "add_", "sub_", "div_", "clamp_", "erfinv_",
}
_MAKE = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.arange, torch.linspace, torch.logspace,
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.tensor, torch.as_tensor,
    torch.tril_indices, torch.triu_indices,
}
# fmt: on


def _values(content: object, depth: int = 0) -> Iterator[object]:
    """All scalars in nested lists and dictionaries; refuses deep, long or foreign ones."""
    if depth > MOST_DEPTH:
        raise InputError(f"recipe: its arguments are nested deeper than {MOST_DEPTH} levels")
    if isinstance(content, (list, tuple, dict)):
        if len(content) > MOST_VALUES:
            raise InputError(f"recipe: an argument has {len(content)} values, at most {MOST_VALUES} are expected")
        for key in content if isinstance(content, dict) else ():
            if not isinstance(key, str) or not re.fullmatch(r"\w{1,64}", key):
                raise InputError(f"recipe: {str(key)[:80]!r} is not the name of an argument")
        for value in content.values() if isinstance(content, dict) else content:
            yield from _values(value, depth + 1)
    elif content is None or isinstance(content, (str, bool, int, float)):
        yield content
    else:
        raise InputError(f"recipe: expected plain values, got {type(content).__name__}")


_FOLLOWING = ("training", "normalized_shape", "scale", "shape")
"""Attributes that follow the sizes, or the mode."""


def _structure(model: nn.Module) -> list[tuple[str, str, dict[str, Any]]]:
    """Names, classes and settings of all modules, apart from the sizes that pruning changes."""

    def is_setting(name: str, value: object) -> bool:
        return isinstance(value, (str, bool, float, tuple)) and name not in _FOLLOWING

    return [
        (name, type(module).__name__, {key: value for key, value in vars(module).items() if is_setting(key, value)})
        for name, module in model.named_modules()
    ]
