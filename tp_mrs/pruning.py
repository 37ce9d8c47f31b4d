"""Torch-Pruning, as far as we call it: its arguments for a model, coupled groups, counting and pruning."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .architectures import LAYERS, NumHeads, fixed_layers, module_pruners, refresh
from .borrowing import borrowed, still_frozen
from .errors import InputError, check_example_inputs, check_layers, device_of
from .tracing import node_pruners, reasons_to_keep, trace

PRUNING_ERRORS = (RuntimeError, ValueError, AssertionError, IndexError, TypeError, AttributeError, KeyError)
"""What tracing, pruning and running a model raise where its dependency graph is wrong."""


def pruner_kwargs(model: nn.Module, ignored_layers: Iterable[nn.Module] = ()) -> dict[str, Any]:
    """Arguments that any Torch-Pruning pruner needs for a timm model: pass them as `**pruner_kwargs(model)`.

    The classifier is ignored, so that the outputs stay; the attention layers' numbers of heads are given. All
    dictionaries are new with each call, because Torch-Pruning's own defaults are shared between pruners and mutated.
    Torch-Pruning makes new parameters of those that it shortens: freeze again what was frozen after `pruner.step()`.

    Args:
        model: a timm model, or any model whose classifier is its last linear or convolutional layer.
        ignored_layers: further layers, or blocks of them, that keep their outputs.

    Raises:
        InputError: the model has no layer that could be pruned, or an ignored layer is none of its own.
    """
    device_of(model)
    ignored = check_layers("ignored_layers", ignored_layers, model)
    channel_groups: dict[nn.Module, int] = {}
    return {
        "ignored_layers": [*_classifier(model), *fixed_layers(model), *ignored],
        "num_heads": NumHeads(model),
        "in_channel_groups": {},
        "out_channel_groups": channel_groups,
        "customized_pruners": {**node_pruners(), **module_pruners(model)},
        "forward_fn": partial(trace, channel_groups=channel_groups),
    }


def _classifier(model: nn.Module) -> list[nn.Module]:
    getter: Any = getattr(model, "get_classifier", None)
    found = getter() if callable(getter) else None
    if isinstance(found, nn.Module):
        return [found]
    if isinstance(found, (tuple, list)):
        return [module for module in found if isinstance(module, nn.Module)]
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    if not layers:
        raise InputError("model: it has no convolutional or linear layer, so there is nothing to prune")
    return [layers[-1]]


@dataclass(frozen=True)
class Member:
    """One side of a layer that changes with a group; `units` says for each of `channels` which unit it goes with."""

    name: str
    side: Literal["out", "in", "both"]
    channels: tuple[int, ...]
    units: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Layers coupled by the dependency graph, named after its root; `units` can be removed, one by one.

    A unit is a channel; with attention heads or grouped convolutions, one channel of each head or group, of which
    there are `repeats`.
    """

    name: str
    units: int
    repeats: int
    members: tuple[Member, ...]
    layers: tuple[str, ...]


def build_pruner(
    model: nn.Module,
    example_inputs: Tensor,
    importance: Any = None,
    ignored_layers: Iterable[nn.Module] = (),
    **kwargs: Any,
) -> Any:
    """A `tp.pruner.BasePruner` with `pruner_kwargs(model)`; training flags, gradients and random state are kept.

    Raises:
        InputError: the example inputs don't fit, or the model can't be traced.
    """
    check_example_inputs(model, example_inputs)
    importance = importance if importance is not None else tp.importance.MagnitudeImportance()
    arguments = {**pruner_kwargs(model, ignored_layers), **kwargs}
    with borrowed(model):
        try:
            with torch.no_grad():
                model(example_inputs)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise InputError(
                f"example_inputs: the model cannot run on {tuple(example_inputs.shape)}: {error}"
            ) from error
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unwrapped parameters")  # the trace sees to them
            try:
                return tp.pruner.BasePruner(model, example_inputs, importance=importance, **arguments)
            except PRUNING_ERRORS as error:
                raise InputError(f"model: Torch-Pruning cannot trace it ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class RootedGroup:
    """A coupled group rooted as pruners root it, which for attention is at the layer behind it.

    Unit u stands for the root's channels u, u + units, … (`repeats` of them).
    """

    raw: Any
    root: nn.Module
    units: int
    repeats: int

    def alike(self) -> list[list[int]]:
        """The units, in classes that touch the same members in as many places; a concatenation has several."""
        touched: list[Counter[int]] = [Counter() for _ in range(self.units)]
        for position, item in enumerate(self.raw):
            for root_index in item.root_idxs:
                touched[root_index % self.units][position] += 1
        classes: dict[frozenset[tuple[int, int]], list[int]] = {}
        for unit, counter in enumerate(touched):
            classes.setdefault(frozenset(counter.items()), []).append(unit)
        return list(classes.values())

    def of(self, pruner: Any, units: Iterable[int]) -> Any:
        """Torch-Pruning's group of these units alone."""
        indices = [unit + repeat * self.units for repeat in range(self.repeats) for unit in units]
        return pruner.DG.get_pruning_group(self.raw[0].dep.target.module, self.raw[0].dep.handler, indices)


def rooted_groups(pruner: Any) -> Iterator[RootedGroup]:
    """The groups that `pruner` ranks, one after the other; not those it leaves alone, as where they end at a fence."""
    graph, ignored, roots = pruner.DG, pruner.ignored_layers, pruner.root_module_types
    for raw in filter(pruner._check_pruning_ratio, graph.get_all_groups(ignored, roots)):
        root = raw[0].dep.target.module
        if pruner._is_atten_group(raw)[0]:
            raw = pruner._downstream_node_as_root_if_attention(raw)
            if raw is None:
                continue
        repeats = pruner._get_channel_groups(raw)
        yield RootedGroup(raw, root, len(raw[0].idxs) // repeats, repeats)


def prunable_groups(model: nn.Module, example_inputs: Tensor, ignored_layers: Iterable[nn.Module] = ()) -> list[Group]:
    """The coupled groups from which a pruner with `pruner_kwargs(model, ignored_layers)` removes channels.

    Raises:
        InputError: there are none.
    """
    ignored = list(ignored_layers)
    groups = groups_left(model, example_inputs, ignored)
    if not groups and ignored and groups_left(model, example_inputs):
        raise InputError("ignored_layers: without these there is nothing to prune; leave some of them out")
    if not groups:
        reasons = [f"{name}: {reason}" for name, reason in reasons_to_keep(model, example_inputs).items()]
        raise InputError(
            "model: it has no prunable layers; besides its classifier it needs a conv or linear layer whose channels "
            f"can be followed ({'; '.join(reasons[-3:]) or 'it has none'})"
        )
    return groups


def groups_left(model: nn.Module, example_inputs: Tensor, ignored_layers: Iterable[nn.Module] = ()) -> list[Group]:
    """The same of a model that has been pruned already, which may have none left."""
    pruner = build_pruner(model, example_inputs, ignored_layers=ignored_layers)
    names = {module: name for name, module in model.named_modules()}
    return [_describe_group(pruner, rooted, names) for rooted in rooted_groups(pruner)]


def _describe_group(pruner: Any, rooted: RootedGroup, names: Mapping[nn.Module, str]) -> Group:
    """Torch-Pruning's group in our terms."""
    members = tuple(
        Member(
            names[item.dep.target.module],
            side_of(pruner.DG, item.dep.handler),
            tuple(item.idxs),
            tuple(index % rooted.units for index in item.root_idxs),
        )
        for item in rooted.raw
        if item.dep.target.module in names
    )
    layers = tuple(names[module] for module in layers_of(rooted.raw) if module in names)
    return Group(names[rooted.root], rooted.units, rooted.repeats, members, layers)


def side_of(graph: Any, handler: Callable[..., Any]) -> Literal["out", "in", "both"]:
    """Which side of a layer a pruning function of the dependency graph takes channels from."""
    is_out, is_in = graph.is_out_channel_pruning_fn(handler), graph.is_in_channel_pruning_fn(handler)
    return "both" if is_out and is_in else "out" if is_out else "in"


def layers_of(group: Any) -> list[nn.Module]:
    """The convolutional and linear layers of a Torch-Pruning group, input and output side, each once."""
    modules = (dependency.target.module for dependency, _ in group)
    return list(dict.fromkeys(module for module in modules if isinstance(module, LAYERS)))


def prune_by_ratio(
    model: nn.Module,
    example_inputs: Tensor,
    ratios: Mapping[nn.Module, float],
    importance: Any = None,
    step: Callable[[Any], None] = methodcaller("step"),
) -> None:
    """Prune `model` in place by a `pruning_ratio_dict`, in one step; groups that it doesn't name are kept whole.

    Without an importance, for where shapes alone matter, the first channels go.

    Raises:
        InputError: the importance has no scores for a group that is to be pruned; nothing was changed.
    """

    def scored(group: Any) -> Tensor | None:
        if importance is None:
            return torch.arange(len(group[0].idxs), dtype=torch.float32)
        scores: Tensor | None = importance(group)
        if scores is not None:
            return scores
        shrunk = [item.dep.target.module for item in group if side_of(pruner.DG, item.dep.handler) != "in"]
        if any(ratios.get(module) for module in shrunk):
            name = next(name for name, module in model.named_modules() if module in shrunk)
            raise InputError(
                f"base: it gives no scores for the group of {name}, which is to be pruned; choose one that scores "
                "every layer, such as 'sensitivity' or 'magnitude'"
            )
        return None

    pruner = build_pruner(model, example_inputs, scored, pruning_ratio=0.0, pruning_ratio_dict=dict(ratios))
    with still_frozen(model):
        step(pruner)
    refresh(model)


def width(module: nn.Module, side: Literal["out", "in"]) -> int:
    """Number of output or input channels of a layer; 0 for what has none."""
    names = {
        "out": ("out_channels", "out_features", "num_features", "num_channels"),
        "in": ("in_channels", "in_features", "num_features", "num_channels"),
    }[side]
    for name in names:
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if shape else 0
