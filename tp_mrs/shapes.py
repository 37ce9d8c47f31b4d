"""Put tensors of pruned shapes into an architecture of full size, and let its layers' size attributes follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import InputError
from .models import NORMALIZATION_BUFFERS
from .tensorfile import FLOATS

Conv = nn.modules.conv._ConvNd
Norm = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Slot:
    """A place for a tensor in a model: a parameter, or a buffer, which may be empty or outside the state dict."""

    module: nn.Module
    key: str
    tensor: Tensor | None
    persistent: bool


def slots(model: nn.Module) -> dict[str, Slot]:
    """All parameters and buffers by name, except the statistics of `normalize`; shared ones under each name."""
    found: dict[str, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found[start + key] = Slot(module, key, parameter, persistent=True)
        for key, buffer in module._buffers.items():
            persistent = key not in module._non_persistent_buffers_set
            if (buffer is not None or not persistent) and key not in NORMALIZATION_BUFFERS:
                found[start + key] = Slot(module, key, buffer, persistent)
    return found


def check_fit(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    groups: Mapping[str, int] | None = None,
    complete: bool = False,
    full: bool = False,
) -> dict[str, Slot]:
    """Check that `tensors` bear the names of the model's and fit, being as large or smaller; changes nothing.

    Every tensor must have the rank and kind (floating point, or the same integer type) of the architecture's. Integer
    tensors (indices, masks, counters) keep their shape. Floating-point ones may shrink in every dimension, as tables
    and un-wrapped parameters do, but not to nothing; the kernels of convolutions only in the first two, their channels.
    The vectors of a layer (bias, scale, running statistics) must have one length.

    Args:
        model: the architecture, on any device.
        tensors: by name of a parameter or buffer.
        groups: of convolutions, by name, where they are known.
        complete: whether buffers outside the state dict must be there too.
        full: whether every tensor must be as large as the architecture's.

    Returns:
        where each tensor goes, for `fill`.

    Raises:
        InputError: naming the first tensor or layer that doesn't fit.
    """
    places = slots(model)
    needed = {name for name, slot in places.items() if slot.tensor is not None and (slot.persistent or complete)}
    missing, extra = sorted(needed - set(tensors)), sorted(set(tensors) - set(places))
    if missing or extra:
        raise InputError(
            f"it doesn't fit the architecture (made with other arguments?); missing {missing[:3]}, "
            f"unexpected {extra[:3]} ({len(missing)} and {len(extra)} in all)"
        )
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, places[name], full=full)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition(".")
        layers.setdefault(layer, {})[key] = tensor
    for layer, own in layers.items():
        module = places[f"{layer}.{next(iter(own))}" if layer else next(iter(own))].module
        _check_layer(layer, module, own, (groups or {}).get(layer))
    return {name: places[name] for name in tensors}


def fill(places: Mapping[str, Slot], tensors: Mapping[str, Tensor], *, groups: Mapping[str, int] | None = None) -> None:
    """Replace parameters and buffers by copies of `tensors`; the layers' sizes and groups follow.

    Types are the tensors' own. Parameters that modules share stay shared, if their values are the same.

    Args:
        places: what `check_fit` returned for the same tensors.
        tensors: by name.
        groups: of convolutions, by name, where they are known.
    """
    parameters: dict[int, nn.Parameter] = {}
    for name, slot in places.items():
        tensor = tensors[name].clone()
        if isinstance(slot.tensor, nn.Parameter):
            shared = parameters.get(id(slot.tensor))
            if shared is None or not torch.equal(shared, tensor):  # pruning parts what was shared
                shared = parameters[id(slot.tensor)] = nn.Parameter(tensor, requires_grad=slot.tensor.requires_grad)
            _set_parameter(slot.module, slot.key, shared)
        else:
            slot.module._buffers[slot.key] = tensor
    layers = {name.rpartition(".")[0]: slot.module for name, slot in places.items()}
    for layer, module in layers.items():
        _follow_shapes(module, (groups or {}).get(layer))


def _set_parameter(module: nn.Module, key: str, parameter: nn.Parameter) -> None:
    if type(module).__setattr__ is nn.Module.__setattr__:
        module._parameters[key] = parameter  # where setattr would put it, in a fraction of the time
    else:
        setattr(module, key, parameter)  # recurrent layers keep a second list


def _check_tensor(name: str, tensor: Tensor, slot: Slot, *, full: bool) -> None:
    dense = slot.tensor
    if dense is None:
        return
    number = dense.is_floating_point()
    if tensor.dtype not in FLOATS if number else tensor.dtype != dense.dtype:
        kind = "floating point" if number else dense.dtype
        raise InputError(f"{name} has type {tensor.dtype}, the architecture's is {kind}")
    shape, most = tuple(tensor.shape), tuple(dense.shape)
    fixed = 0 if not number else 2 if isinstance(slot.module, Conv) and slot.key == "weight" else None
    fits = len(shape) == len(most) and all(
        size == limit or 0 < size < limit for size, limit in zip(shape, most, strict=True)
    )
    if not fits or (fixed is not None and shape[fixed:] != most[fixed:]):
        raise InputError(f"{name} has shape {shape}, the architecture's is {most}")
    if full and shape != most:
        raise InputError(
            f"{name} has shape {shape}, the architecture's is {most}, and the file says nothing of pruning; "
            "keep pruned models with tp_mrs.save"
        )


def _check_layer(name: str, module: nn.Module, tensors: Mapping[str, Tensor], groups: int | None) -> None:
    """That a layer's vectors have one length, and its groups divide its channels."""
    weight = tensors.get("weight")
    if isinstance(module, (Conv, nn.Linear, *Norm)) and weight is not None:
        lengths = {len(tensor) for tensor in tensors.values() if tensor.dim() == 1}
        if isinstance(module, Conv):
            found = _groups(module, weight, groups)
            if not 1 <= found <= module.groups or len(weight) % found:
                raise InputError(f"{name} has {len(weight)} channels, which {found} groups do not divide")
            lengths.add(weight.shape[1] * found if module.transposed else len(weight))
        elif weight.dim() <= 2:
            lengths.add(len(weight))
        if len(lengths) > 1:
            raise InputError(f"the tensors of {name} have different lengths: {sorted(lengths)}")


def _groups(conv: Conv, weight: Tensor, recorded: int | None) -> int:
    """Groups of a pruned convolution: as recorded; else unchanged, or following the channels if each had its own."""
    if recorded is not None or conv.groups == 1 or conv.groups != conv.in_channels:
        return conv.groups if recorded is None else recorded
    if conv.transposed:
        return len(weight)
    return max(len(weight) // (conv.out_channels // conv.in_channels), 1)


def _follow_shapes(module: nn.Module, groups: int | None) -> None:
    """Set the size attributes of a layer by the shapes of its tensors."""
    if isinstance(module, nn.MultiheadAttention):
        _follow_attention(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        weight = getattr(module, "running_mean", None)
    if not isinstance(weight, Tensor):
        return
    shape = tuple(weight.shape)
    if isinstance(module, Conv):
        module.groups = _groups(module, weight, groups)
        first, second = shape[0], shape[1] * module.groups
        module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)
    elif isinstance(getattr(module, "normalized_shape", None), tuple):  # LayerNorm, RMSNorm and timm's own
        vars(module)["normalized_shape"] = shape
    for kind, attributes in _SIZES.items():
        if isinstance(module, kind):
            vars(module).update(zip(attributes, shape, strict=True))


_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.modules.batchnorm._NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels",),
    nn.PReLU: ("num_parameters",),
}


def _follow_attention(module: nn.MultiheadAttention) -> None:
    query = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
    module.embed_dim = module.out_proj.weight.shape[0]
    module.kdim = query.shape[1] if module.k_proj_weight is None else module.k_proj_weight.shape[1]
    module.vdim = query.shape[1] if module.v_proj_weight is None else module.v_proj_weight.shape[1]
    module.head_dim = module.embed_dim // module.num_heads
