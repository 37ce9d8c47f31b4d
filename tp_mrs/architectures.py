"""What Torch-Pruning must be told about timm's modules, and what they must be told after pruning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch_pruning as tp
from timm.layers import RmsNorm, RmsNorm2d
from timm.layers.attention import Attention
from timm.models.metaformer import Scale
from torch import nn

from .errors import check_module

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
"""The layers that carry a sensitivity, and whose channels are pruned."""


RMS_NORMS = tuple(kind for kind in (getattr(nn, "RMSNorm", None), RmsNorm, RmsNorm2d) if kind is not None)


def prunable_attention(model: nn.Module) -> Iterator[Any]:
    """Attention whose heads Torch-Pruning can narrow: one projection to queries, keys and values, mixed plainly."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if isinstance(module, Attention) and _plain(module):
            yield module


def _plain(module: Any) -> bool:
    parts = (module.q_norm, module.k_norm, module.norm)
    return all(isinstance(part, nn.Identity) for part in parts) and getattr(module, "gate", None) is None


FLEXIBLE = ("AttentionRope", "EvaAttention", "MultiScaleAttention")
"""Attention of timm's whose code asks nothing of the width of its input."""


class NumHeads(dict[nn.Module, int]):
    """Projection → number of heads. When a pruner takes some away, it leaves word of it for `refresh`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__({module.qkv: module.num_heads for module in prunable_attention(model)})

    def __setitem__(self, projection: Any, heads: int) -> None:
        super().__setitem__(projection, heads)
        projection.tp_mrs_num_heads = heads


def refresh(model: nn.Module) -> nn.Module:
    """Bring the sizes that timm's modules keep as numbers in line with their pruned weights.

    Call it after each `pruner.step()`. Attention gets its number and width of heads. Its `scale` becomes the one of
    the new width, as fused attention computes it, and the queries make up for that, so that the function stays. Other
    modules are left as they are. Calling again changes nothing. Returns the model.

    Raises:
        InputError: `model` is no module.
    """
    check_module(model)
    before = [(module, module.scale) for module in prunable_attention(model)]
    take_sizes(model)
    for module, scale in before:
        if module.scale != scale:
            for tensor in (module.qkv.weight, module.qkv.bias):
                if tensor is not None:
                    tensor.data[: module.attn_dim] *= scale / module.scale
    return model


def take_sizes(model: nn.Module) -> None:
    """The part of `refresh` that changes no weights: for weights that come from a model that has been refreshed."""
    for module in prunable_attention(model):
        heads = vars(module.qkv).pop("tp_mrs_num_heads", module.num_heads)
        width = module.qkv.out_features // 3
        if width != module.attn_dim:
            module.num_heads, module.attn_dim, module.head_dim = heads, width, width // heads
            module.scale = module.head_dim**-0.5
    for module in model.modules():
        if isinstance(module, Scale):
            module.shape = (len(module.scale), *module.shape[1:])
        elif isinstance(module, RMS_NORMS) and isinstance(module.weight, nn.Parameter):
            module.normalized_shape = tuple(module.weight.shape)


def rigid_attention(model: nn.Module) -> Iterator[nn.Module]:
    """Attention that takes sizes inside from the width of its input, or may: both must stay as they are."""
    plain = set(prunable_attention(model))
    for module in model.modules():
        sizes = (getattr(module, "num_heads", None), getattr(module, "head_dim", None))
        layered = any(isinstance(child, LAYERS) for child in module.children())
        known = module in plain or type(module).__name__ in FLEXIBLE
        if layered and not known and any(isinstance(size, int) for size in sizes):
            yield module


def fixed_layers(model: nn.Module) -> list[nn.Module]:
    """Layers whose numbers of outputs must not change."""
    inside = [layer for module in rigid_attention(model) for layer in module.modules() if isinstance(layer, LAYERS)]
    return [*inside, *stiff_modules(model)]


def stiff_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Modules whose sizes Torch-Pruning cannot change, though it would try, and why."""
    users = Counter(id(layer._parameters.get("weight")) for layer in model.modules() if isinstance(layer, LAYERS))
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, LAYERS):
            weight = module._parameters.get("weight")
            if weight is None:
                found[module] = f"{kind} computes its weight, as weight_norm does; remove that first, to prune it"
            elif users[id(weight)] > 1:
                found[module] = "shares its weight with another layer"
            elif isinstance(module, nn.modules.conv._ConvNd) and _several_per_group(module):
                found[module] = f"{kind} with several inputs or outputs in each of its groups"
        elif isinstance(module, (nn.LSTM, nn.MultiheadAttention)):
            found[module] = f"{kind} cannot be pruned"
    return found


def _several_per_group(conv: nn.modules.conv._ConvNd) -> bool:
    """Several outputs for one input in each group, or several inputs for one output."""
    several = conv.in_channels != conv.out_channels and conv.groups in (conv.in_channels, conv.out_channels)
    return conv.groups > 1 and (several or conv.transposed)


def module_pruners(model: nn.Module) -> dict[type, Any]:
    """`customized_pruners` for modules with parameters that Torch-Pruning leaves behind, or expects in vain."""
    pruners: dict[type, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) and module.bias is None:
            pruners[type(module)] = _GroupNormPruner()
        elif isinstance(module, nn.Conv2d) and isinstance(getattr(module, "gain", None), nn.Parameter):
            pruners[type(module)] = _ScaledConvPruner()
    return pruners


class _GroupNormPruner(tp.pruner.function.GroupNormPruner):
    """Of a norm with or without a bias."""

    def prune_out_channels(self, layer: nn.GroupNorm, idxs: Sequence[int]) -> nn.Module:
        keep = sorted(set(range(layer.num_channels)) - set(idxs))
        layer.num_channels = len(keep)
        for name in ("weight", "bias"):
            parameter = getattr(layer, name)
            if parameter is not None:
                setattr(layer, name, self._prune_parameter_and_grad(parameter, keep, 0))
        return layer

    prune_in_channels = prune_out_channels


class _ScaledConvPruner(tp.pruner.function.ConvPruner):
    """Of a convolution with standardised weights and a gain for each output, as in NFNets."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        keep = sorted(set(range(layer.out_channels)) - set(idxs))
        layer.gain = self._prune_parameter_and_grad(layer.gain, keep, 0)
        return super().prune_out_channels(layer, idxs)
