"""Proof that coupled channels are coupled: swap some, or prune dead ones, and the output stays as it was."""

from __future__ import annotations

import copy
import math
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .architectures import refresh
from .borrowing import copied, preserved_rng
from .errors import InputError, check_example_inputs, check_seed
from .pruning import PRUNING_ERRORS, RootedGroup, build_pruner, rooted_groups
from .tracing import reasons_to_keep, tensors_in

TOLERANCE = 1e-10
"""Largest change of an output, relative to the largest output, that rounding in double precision may explain."""

Split = tuple[list[int], list[int]]
"""Two disjoint sets of units, each ascending, that trade places one by one."""


@dataclass(frozen=True)
class GroupCheck:
    """What became of one coupled group. Changes are the largest of any output, relative to the largest output.

    Attributes:
        group: name of its root layer.
        units: channels that can be removed from it one by one; with heads or grouped convolutions, one in each.
        swapped: change after swapping half of the units with the other half in every member.
        control: the same swap in the root layer alone: how a fault would show.
        pruned: change after removing half of the units whose weights are zero.
        fault: what is wrong, in words; None if the coupling is proven.
    """

    group: str
    units: int
    swapped: float = math.nan
    control: float = math.nan
    pruned: float = math.nan
    fault: str | None = None

    @property
    def allowed(self) -> float:
        """The change that rounding may explain: little, and far less than a fault would cause."""
        return min(TOLERANCE, self.control / 20)  # nothing at all where a fault would not show

    def judged(self) -> GroupCheck:
        """With a fault in words, if the numbers show one."""
        if self.fault is not None or math.isnan(self.swapped):
            return self
        if not self.swapped <= TOLERANCE:
            return replace(self, fault="swapping coupled channels changes the output")
        if not 20 * self.swapped < self.control:
            return replace(self, fault="the output depends on it too little to tell")
        if not self.pruned <= self.allowed:
            return replace(self, fault="pruning dead channels changes the output")
        return self


@dataclass(frozen=True)
class CouplingReport:
    """The outcome of `check_coupling`.

    Attributes:
        checks: one for each group, in the order of the dependency graph.
        kept: name of each layer whose outputs can't be pruned, because they run into something that Torch-Pruning could
            not follow → what that is.
    """

    checks: tuple[GroupCheck, ...]
    kept: Mapping[str, str]

    @property
    def proven(self) -> bool:
        """Whether there are groups and none has a fault."""
        return bool(self.checks) and not self.faults

    @property
    def faults(self) -> tuple[GroupCheck, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.fault is not None)

    def __str__(self) -> str:
        width = max([len(check.group) for check in self.checks] + [len("group")])
        lines = [
            f"{len(self.checks) - len(self.faults)} of {len(self.checks)} coupled groups proven",
            f"{'group':<{width}}  units   swapped   control    pruned",
        ]
        for check in self.checks:
            numbers = f"{check.units:>5}  {check.swapped:>8.1e}  {check.control:>8.1e}  {check.pruned:>8.1e}"
            lines.append(f"{check.group:<{width}}  {numbers}  {check.fault or ''}".rstrip())
        if not self.checks:
            lines = ["nothing of this model can be pruned"]
        if self.kept:
            lines.append("not pruned, because their outputs can't be followed:")
            lines += [f"  {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def check_coupling(
    model: nn.Module,
    example_inputs: Tensor,
    *,
    seed: int = 0,
) -> CouplingReport:
    """Prove, group by group, that Torch-Pruning removes from `model` what belongs together, and nothing else.

    Two channels that are swapped in every layer they pass through leave a network's function as it was, and so does
    removing channels that carry nothing. Both are tried with half of each group's channels, on a copy of the model in
    double precision with random images, where norm parameters, statistics, and whatever else is constant are random,
    so that no symmetry hides a mistake. What belongs to a channel is read off what Torch-Pruning's functions remove.

    Args:
        model: comes back as it was.
        example_inputs: (N, C, H, W), on the model's device; only shape and device count.
        seed: of the random values.

    Raises:
        InputError: an argument is unusable, or the model cannot be pruned at all.

    Notes:
        Means and norms over channels count fewer of them once dead ones are gone. For the second check they divide by
        the number from before. Groups of one unit can't be swapped or pruned; they pass.
    """
    check_example_inputs(model, example_inputs)
    check_seed(seed)
    with preserved_rng(model, seed):
        probe = _randomised(copied(model).double().eval())
        images = torch.randn_like(example_inputs, dtype=torch.float64)
        pruner = build_pruner(probe, images)
        names = {module: name for name, module in probe.named_modules()}
        reference = _output(probe, images)
        if not bool(reference.isfinite().all()):
            raise InputError("model: its outputs are not finite, even in double precision; check its weights")
        groups = list(rooted_groups(pruner))
        splits = [_split(group.alike()) for group in groups]
        checks = [
            _check_swap(probe, pruner, group, names[group.root], split, images, reference)
            for group, split in zip(groups, splits, strict=True)
        ]
        checks = _check_pruning(probe, images, checks, splits)
        return CouplingReport(tuple(check.judged() for check in checks), reasons_to_keep(probe, images))


def _check_swap(
    model: nn.Module, pruner: Any, group: RootedGroup, name: str, split: Split, images: Tensor, reference: Tensor
) -> GroupCheck:
    """Swap the two halves of the units, in every member and, as a control, in the root alone."""
    if not split[0]:
        return GroupCheck(name, group.units)
    try:
        first, second = (group.of(pruner, units) for units in split)
        exchanges = [list(_exchanges(one, other)) for one, other in zip(first, second, strict=True)]
        swapped = _change(model, images, reference, [exchange for member in exchanges for exchange in member])
        control = _change(model, images, reference, exchanges[0])
    except PRUNING_ERRORS as error:
        return GroupCheck(name, group.units, fault=_in_words(error))
    fault = None if math.isfinite(swapped) and math.isfinite(control) else "the output is no longer finite"
    return GroupCheck(name, group.units, swapped, control, fault=fault)


def _check_pruning(
    model: nn.Module, images: Tensor, checks: Sequence[GroupCheck], splits: Sequence[Split]
) -> list[GroupCheck]:
    """Prune dead units of all groups at once; where that goes wrong, one group at a time."""

    def attempt(chosen: Sequence[int]) -> tuple[float, str | None]:
        units = {i: splits[i][0] for i in chosen}
        try:
            return _pruning_change(copied(model), images, units), None
        except PRUNING_ERRORS as error:
            return math.nan, _in_words(error)

    sound = [i for i, check in enumerate(checks) if check.fault is None and splits[i][0]]
    together, problem = attempt(sound)
    checks = list(checks)
    for i in sound:
        fine = problem is None and together <= checks[i].allowed
        value, fault = (together, None) if fine else attempt([i])
        checks[i] = replace(checks[i], pruned=value, fault=fault)
    return checks


def _pruning_change(model: nn.Module, images: Tensor, units: Mapping[int, list[int]]) -> float:
    """Make the given units of the groups dead, prune them, and compare the outputs."""
    pruner = build_pruner(model, images)
    chosen = [(group, units[index]) for index, group in enumerate(rooted_groups(pruner)) if index in units]
    counts = _FixedCounts()
    for group, indices in chosen:
        for member in group.of(pruner, indices):
            _make_zero(member)
    with counts:
        before = _output(model, images)
    for group, indices in chosen:
        _prune_in_two_steps(pruner, group, indices)
    refresh(model)
    counts.rewind()
    with counts:
        after = _output(model, images)
    return relative_change(after, before)


@torch.no_grad()
def _make_zero(member: Any) -> None:
    for tensor, removal in _removed(*member):
        for dim, indices in removal if isinstance(tensor, nn.Parameter) else ():
            tensor.index_fill_(dim, indices, 0)


def _prune_in_two_steps(pruner: Any, group: RootedGroup, units: list[int]) -> None:
    """The second half of the units has moved up by then; the graph has to know."""
    first, second = units[::2], units[1::2]
    group.of(pruner, first).prune()
    if second:
        moved = [unit - bisect(first, unit) for unit in second]
        replace(group, units=group.units - len(first)).of(pruner, moved).prune()


Removal = list[tuple[int, Tensor]]
"""(dimension, indices along it) pairs that go."""


def _exchanges(one: Any, other: Any) -> Iterator[tuple[Tensor, int, Tensor, Tensor]]:
    """(tensor, dimension, indices, indices) that trade places when the units of `one` become those of `other`."""
    for (tensor, mine), (_, theirs) in zip(_removed(*one), _removed(*other), strict=True):
        for (dim, here), (_, there) in zip(mine, theirs, strict=True):
            if len(here) != len(there):
                raise ValueError(f"one unit has {len(here)} indices in a member, another {len(there)}")
            yield tensor, dim, here, there


def _removed(dependency: Any, indices: Sequence[int]) -> Iterator[tuple[Tensor, Removal]]:
    """The tensors of a member, and which of their indices Torch-Pruning removes, found by pruning a numbered copy."""
    target = dependency.target.module
    dependency.handler.__self__.pruning_dim = dependency.target.pruning_dim
    if isinstance(target, nn.Parameter):
        yield target, _missing(dependency.handler(_numbered(target), list(indices)), target.shape)
        return
    tensors = _tensors(target)
    if not tensors:
        return
    stand_in = copy.deepcopy(target, {id(tensor): _numbered(tensor) for tensor in tensors.values()})
    dependency.handler(stand_in, list(indices))
    for name, survivor in _tensors(stand_in).items():
        if survivor.shape != tensors[name].shape:
            yield tensors[name], _missing(survivor, tensors[name].shape)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _numbered(tensor: Tensor) -> Tensor:
    """The same shape, each element holding its own position."""
    numbers = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
    return nn.Parameter(numbers) if isinstance(tensor, nn.Parameter) else numbers


def _missing(survivor: Tensor, shape: torch.Size) -> Removal:
    """Along each dimension of `shape`, the indices that the numbered `survivor` has lost."""
    removal = []
    for dim, size in enumerate(shape):
        line = survivor.detach().movedim(dim, 0).reshape(survivor.shape[dim], -1)[:, 0].long()
        kept = torch.zeros(size, dtype=torch.bool)
        kept[torch.unravel_index(line, shape)[dim]] = True
        if not kept.all():
            removal.append((dim, (~kept).nonzero().flatten()))
    return removal


def _change(model: nn.Module, images: Tensor, reference: Tensor, exchanges: Sequence[Any]) -> float:
    """How much the output changes while the given slices have traded places."""
    try:
        _trade(exchanges)
        return relative_change(_output(model, images), reference)
    finally:
        _trade(exchanges)


@torch.no_grad()
def _trade(exchanges: Sequence[tuple[Tensor, int, Tensor, Tensor]]) -> None:
    for tensor, dim, here, there in exchanges:
        mine, theirs = tensor.index_select(dim, here), tensor.index_select(dim, there)
        tensor.index_copy_(dim, here, theirs)
        tensor.index_copy_(dim, there, mine)


def _split(classes: Iterable[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Two random halves of the units, alike one by one and each ascending; odd ones out stay where they are."""
    first, second = [], []
    for units in classes:
        order = torch.randperm(len(units)).tolist()
        half = len(units) // 2
        first += [units[i] for i in sorted(order[:half])]
        second += [units[i] for i in sorted(order[half : 2 * half])]
    return first, second


def relative_change(output: Tensor, reference: Tensor) -> float:
    """Largest difference of two outputs relative to the largest value of the reference; infinite if shapes differ."""
    if output.shape != reference.shape:
        return math.inf
    return float((output - reference).abs().max() / reference.abs().max())


@torch.no_grad()
def _output(model: nn.Module, images: Tensor) -> Tensor:
    """All outputs of the model in one vector for each image."""
    parts = [part.double() for part in tensors_in(model(images))]
    return torch.cat([part.reshape(len(images), -1) for part in parts], dim=1)


@torch.no_grad()
def _randomised(model: nn.Module) -> nn.Module:
    """Give every constant parameter, and BatchNorm's statistics, random values of ordinary size."""
    for parameter in model.parameters():
        if parameter.numel() and parameter.min() == parameter.max():
            parameter.uniform_(0.5, 1.5)
    for module in model.modules():
        if (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.running_mean is not None
            and module.running_var is not None
        ):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model


class _FixedCounts(TorchFunctionMode):
    """Means and norms that divide, call by call, by the number of values of the first run: zeros count for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: list[int] = []
        self._call = 0

    def rewind(self) -> None:
        """Start the next run."""
        self._call = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (F.layer_norm, F.group_norm, F.rms_norm):
            return self._norm(function, *args, **kwargs)
        if function is F.batch_norm and kwargs.get("training"):  # of weights, in convolutions that standardise them
            return self._standardised(args[0], kwargs.get("weight"), kwargs["eps"])
        if function in (torch.mean, Tensor.mean, torch.var, Tensor.var) and kwargs.get("keepdim"):
            moment = self._mean if function in (torch.mean, Tensor.mean) else self._variance
            return moment(args[0], kwargs["dim"] if "dim" in kwargs else args[1])
        return function(*args, **kwargs)

    def _mean(self, values: Tensor, dims: Any) -> Tensor:
        total = values.sum(dims, keepdim=True)
        if self._call == len(self._counts):
            self._counts.append(values.numel() // total.numel())
        self._call += 1
        return total / self._counts[self._call - 1]

    def _variance(self, values: Tensor, dims: Any) -> Tensor:
        return self._mean(values.square(), dims) - self._mean(values, dims).square()

    def _standardised(self, weights: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        centred = weights - self._mean(weights, (0, 2))
        output = centred / (self._variance(weights, (0, 2)) + eps).sqrt()
        return output if gain is None else output * gain.view(1, -1, 1)

    def _norm(
        self,
        function: Any,
        input: Tensor,
        layout: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        parts = input.unflatten(1, (layout, -1)) if function is F.group_norm else input
        dims = tuple(range(2, parts.dim())) if function is F.group_norm else tuple(range(-len(layout), 0))
        view = (-1, *[1] * (input.dim() - 2)) if function is F.group_norm else tuple(layout)
        if function is F.rms_norm:
            centred, spread = parts, self._mean(parts.square(), dims)
        else:
            centred, spread = parts - self._mean(parts, dims), self._variance(parts, dims)
        output = (centred / (spread + (eps or 1e-5)).sqrt()).reshape(input.shape)
        output = output if weight is None else output * weight.view(view)
        return output if bias is None else output + bias.view(view)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
