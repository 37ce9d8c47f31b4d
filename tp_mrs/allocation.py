"""Set each coupled group's pruning ratio by its sensitivity, so that the pruned model meets a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from .borrowing import copied
from .costs import LayerCost, costs_of, fractions, least_kept, prices
from .counting import count
from .errors import InputError, check_count, check_example_inputs, check_layers, check_number
from .pruning import Group, prunable_groups, prune_by_ratio
from .sensitivity import Sensitivity
from .uncertainty import Array

TOLERANCE = 0.01
"""How far the pruned model may be from the target, as a fraction of the target."""

REACHES, MOST_MOVES, MOST_PLANS = (3, 10, 30), 40_000, 10_000
"""Where whole units miss the target: steps by which two groups are moved, about twice how many such ways are tried, and
how many plans may be tried all."""

Kept = dict[str, int]
"""Units kept of each group."""

Losses = Mapping[str, Array]
"""What losing each unit of each group costs in robustness, ascending, (units,); on any scale."""


def allocate(
    model: nn.Module,
    example_inputs: Tensor,
    sensitivity: Sensitivity | Mapping[str, float],
    *,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    alpha: float = 0.5,
    min_keep: float = 0.1,
    round_to: int | None = None,
    ignored_layers: Iterable[nn.Module] = (),
) -> dict[nn.Module, float]:
    """Return a `pruning_ratio_dict` under which the pruned model meets a budget.

    Each group loses as many units (channels that go together) as have a small sensitivity for what they cost: those
    with `q · (T_u² / (q c_u))^α ≤ λ`, where T_u is the unit's sensitivity (`Sensitivity.units`), c_u what removing it
    saves, and q the fraction of the group's units that are no more sensitive than u. At α = 1 this is `T_u² / c_u ≤ λ`,
    the least Σ T_u² for the budget; at α = 0 all groups lose the same fraction. λ is found by bisection; what is left
    over, as units are whole, goes to the groups that lost their last unit most barely. The budget is then counted on a
    pruned copy of the model.
    Which channels go is up to the importance that you prune with.

    Args:
        model: the model that `sensitivity` was measured on; stays as it is.
        example_inputs: (N, C, H, W), on the model's device.
        sensitivity: from `measure_sensitivity`; or scores of your own, name of each of its groups → a number T_g ≥ 0.
            Units then count as if they rose evenly to it: group g loses the fraction `λ · (c_g / T_g)^α`.
        macs, params, channels: the budget, as a fraction of the model's multiply-accumulates, parameters, or prunable
            channels; give exactly one, in (0, 1].
        alpha: how much cost and sensitivity count. 0 prunes all groups alike; 1 trusts sensitivities, those of the
            dense model, wholly.
        min_keep: least fraction of its channels that a group keeps, in (0, 1]; at least one channel stays anyway.
        round_to: keep multiples of so many channels (or all of a group's).
        ignored_layers: layers, or blocks of them, that keep their outputs, as for `pruner_kwargs`.

    Returns:
        Root layer of each group → fraction of its channels to remove. Pass it as `pruning_ratio_dict` to a local
        (not `global_pruning`) pruner made with `**tp_mrs.pruner_kwargs(model)`.

    Notes:
        Groups differ in how many of their units hardly matter, which no score of a whole group tells. As a score of the
        group, the worst case MRS_g spares wide late layers at the cost of narrow early ones; robust accuracy after much
        pruning is lower than with `Sensitivity.typical` (benchmarks/README.md).

    Raises:
        InputError: an argument is unusable, or no plan was found that meets the budget within 1%; it names the nearest.
    """
    measure, target = single_budget(macs=macs, params=params, channels=channels)
    check_allocation(alpha=alpha, min_keep=min_keep, round_to=round_to)
    check_example_inputs(model, example_inputs)
    ignored = check_layers("ignored_layers", ignored_layers, model)
    groups = prunable_groups(model, example_inputs)
    losses = losses_of(model, sensitivity, groups)
    free = prunable_groups(model, example_inputs, ignored) if ignored else groups
    planner = Planner(model, example_inputs, free, measure, least_units(free, min_keep), round_to)
    whole = {group.name: group.units for group in groups}  # pruners have a ratio of their own for what has none
    return ratios_of(model, groups, whole | planner.plan(losses, target, alpha))


@dataclass(frozen=True)
class Planner:
    """Finds how many units of each group a model may keep.

    Attributes:
        model, example_inputs: what is to be pruned; stays as it is.
        groups: the model's.
        measure: what a budget counts: `"macs"`, `"params"` or `"channels"`.
        least: units of each group that stay.
        round_to: keep multiples of so many channels, or all of a group's.
        alone: units of what can lose no more, such as single channels; a budget of channels counts them.
    """

    model: nn.Module
    example_inputs: Tensor
    groups: Sequence[Group]
    measure: str
    least: Kept
    round_to: int | None
    alone: int = 0

    def plan(self, losses: Losses, target: float, alpha: float) -> Kept:
        """What to keep of each group.

        Raises:
            InputError: the budget can't be met.
        """
        kept, reached = self.nearest(losses, target, alpha)
        if not is_met(reached, target):
            raise self._unreachable(target, kept, reached)
        return kept

    def nearest(self, losses: Losses, target: float, alpha: float) -> tuple[Kept, float]:
        """The plan that is nearest to the budget, and the fraction that it really leaves.

        Aim, count, and aim anew by what the estimate missed; where that does not meet it, again with a wider search.
        """
        costs = costs_of(self.model, self.example_inputs, self.groups, self.measure)
        plan = _Plan(self.groups, costs, losses, alpha, self.least, self.round_to)
        found: list[tuple[Kept, float]] = []
        for wide in (False, True):
            aim = target
            for _ in range(8):
                kept = plan.solve(aim, wide=wide)
                found.append((kept, self.left(kept)))
                if is_met(found[-1][1], target):
                    return found[-1]
                aim = target + plan.cost(kept) - found[-1][1]
        return min(found, key=lambda each: abs(each[1] - target))

    def left(self, kept: Kept) -> float:
        """The fraction of the model that a copy pruned to this really has."""
        if self.measure == "channels":
            return self.amount(self.model, kept) / self.whole
        pruned = copied(self.model)
        prune_by_ratio(pruned, self.example_inputs, ratios_of(pruned, self.groups, kept))
        return self.amount(pruned, kept) / self.whole

    def amount(self, pruned: nn.Module, kept: Kept) -> int:
        """What the model, once it is pruned to this, has of the measure; of channels, those of its groups."""
        if self.measure == "channels":
            return sum(kept.values()) + self.alone
        return amount(pruned, self.example_inputs, self.measure)

    @cached_property
    def whole(self) -> int:
        """What the model has as it is."""
        return self.amount(self.model, {group.name: group.units for group in self.groups})

    def check_reachable(self, target: float) -> None:
        """Raise `InputError` if the model is too large for the budget even with as few channels as may stay."""
        fewest = {group.name: self._choices(group)[0] for group in self.groups}
        left = self.left(fewest)
        if left > target * (1 + TOLERANCE):
            raise self._unreachable(target, fewest, left)

    def part_of_the_way(self, plan: Kept, part: float) -> Kept:
        """Units kept when `part` of the way to `plan` is gone, evenly in their logarithms; multiples as in a plan."""
        return {
            group.name: _rounded(
                group.units * (plan[group.name] / group.units) ** part, _choices(group, plan[group.name], self.round_to)
            )
            for group in self.groups
        }

    def _choices(self, group: Group) -> list[int]:
        return _choices(group, self.least[group.name], self.round_to)

    def _unreachable(self, target: float, kept: Kept, reached: float) -> InputError:
        at_least = any(kept[group.name] == self._choices(group)[0] for group in self.groups)
        lower = [*(["min_keep"] if reached > target and at_least else []), *(["round_to"] if self.round_to else [])]
        remedy = f", or lower {' or '.join(lower)}" if lower else ""
        return InputError(
            f"{self.measure}={target:g}: can't be met within 1%; the nearest is {self.measure}={reached:.4f}{remedy}"
        )


def is_met(reached: float, target: float) -> bool:
    """Whether a fraction is the target, within the tolerance."""
    return abs(reached - target) <= TOLERANCE * target


def ratios_of(model: nn.Module, groups: Iterable[Group], kept: Kept) -> dict[nn.Module, float]:
    """A `pruning_ratio_dict` that keeps so many units of each group."""
    modules = dict(model.named_modules())
    return {modules[group.name]: _ratio(kept[group.name], group.units) for group in groups}


def single_budget(**budgets: float | None) -> tuple[str, float]:
    """Name and value of the one budget given, a fraction in (0, 1]; `InputError` if there are none or several."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise InputError(
            f"{', '.join(budgets)}: give exactly one budget, such as macs=0.5; got {', '.join(given) or 'none'}"
        )
    ((name, value),) = given.items()
    check_number(name, value, low=0, high=1, open_low=True)
    return name, value


def check_allocation(*, alpha: float, min_keep: float, round_to: int | None) -> None:
    """Raise `InputError` unless these arguments of `allocate` are usable."""
    check_number("alpha", alpha, low=0)
    check_number("min_keep", min_keep, low=0, high=1, open_low=True)
    if round_to is not None:
        check_count("round_to", round_to)


def least_units(groups: Iterable[Group], min_keep: float) -> Kept:
    """How many units of each group are this fraction of them, at least one."""
    return {group.name: least_kept(group.units, min_keep) for group in groups}


def losses_of(model: nn.Module, given: Sensitivity | Mapping[str, float], groups: Sequence[Group]) -> dict[str, Array]:
    """By the sensitivities of units, or as if they rose evenly to the score of each group.

    Raises:
        InputError: they are not those of this model.
    """
    if isinstance(given, Sensitivity):
        _check_names(given.units, groups)
        _check_sizes(model, given.sizes)
        return {group.name: np.square(np.sort(given.units[group.name])) for group in groups}
    scores = _scores(given, groups)
    floor = 1e-9 * _geometric_mean(scores.values())  # what never matters has a price, too
    return {group.name: max(scores[group.name], floor) * fractions(group.units) / group.units for group in groups}


def _scores(scores: Any, groups: Sequence[Group]) -> dict[str, float]:
    """The score of each group, as a number."""
    if not isinstance(scores, Mapping):
        raise InputError(
            "sensitivity: expected what measure_sensitivity returns, or a score for each of its groups by name, got "
            f"{type(scores).__name__}"
        )
    _check_names(scores, groups)
    found = {}
    for group in groups:
        try:
            found[group.name] = float(scores[group.name])
        except (TypeError, ValueError):
            found[group.name] = math.nan
        check_number(f"sensitivity[{group.name!r}]", found[group.name], low=0)
    return found


def _geometric_mean(values: Iterable[float]) -> float:
    """Of the positive ones among `values`; 1 if there are none."""
    logarithms = [math.log(value) for value in values if value > 0]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else 1.0


def _check_names(scores: Mapping[str, object], groups: Sequence[Group]) -> None:
    names = [group.name for group in groups]
    missing, unknown = [n for n in names if n not in scores], [str(n)[:60] for n in scores if n not in names]
    if missing or unknown:
        parts = {"missing": missing, "unknown": unknown}
        odd = "; ".join(f"{part}: {', '.join(those[:3])}" for part, those in parts.items() if those)
        raise InputError(
            f"sensitivity: its groups are not this model's ({odd}); measure it on the model you allocate for, or give "
            "a score for each group"
        )


def _check_sizes(model: nn.Module, sizes: Mapping[str, int]) -> None:
    modules = dict(model.named_modules())
    for name, size in sizes.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.numel() != size:
            raise InputError(
                f"sensitivity: it was measured when {name} had {size} weights; measure the model anew after pruning it"
            )


def amount(model: nn.Module, example_inputs: Tensor, measure: str) -> int:
    """How much the model has of `measure`: MACs for one image, parameters, or prunable channels (units)."""
    if measure == "channels":
        return sum(group.units for group in prunable_groups(model, example_inputs))
    counted = count(model, example_inputs)
    return counted.macs if measure == "macs" else counted.params


# --- plans ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Everything that decides how many units each group keeps.

    Costs are fractions of the dense model's; losses are ascending, one for each unit of the group.
    """

    groups: Sequence[Group]
    costs: Sequence[LayerCost]
    losses: Losses
    alpha: float
    least: Kept
    round_to: int | None

    @cached_property
    def limits(self) -> dict[str, Array]:
        """The λ from which on 0, 1, 2, … units of each group go, ascending."""
        whole = {group.name: group.units for group in self.groups}
        found = {}
        for group in self.groups:
            saved = self.cost(whole) - self.cost({**whole, group.name: group.units - 1})
            found[group.name] = np.concatenate([[0.0], prices(self.losses[group.name], saved, self.alpha)])
        return found

    def choices(self, group: Group) -> list[int]:
        return _choices(group, self.least[group.name], self.round_to)

    def wanted(self, level: float) -> dict[str, float]:
        """Units that each group would keep at λ = `level` if they could be split."""
        return {
            group.name: group.units - float(np.interp(level, self.limits[group.name], np.arange(group.units + 1)))
            for group in self.groups
        }

    def rounded(self, wanted: Mapping[str, float]) -> Kept:
        return {group.name: _rounded(wanted[group.name], self.choices(group)) for group in self.groups}

    def removed(self, kept: Kept) -> Kept:
        """Units that go of each group."""
        return {group.name: group.units - kept[group.name] for group in self.groups}

    def cost(self, kept: Kept) -> float:
        removed = self.removed(kept)
        return sum(layer.at(removed) for layer in self.costs)

    def solve(self, target: float, *, wide: bool = False) -> Kept:
        """A plan that costs about `target`, in the proportions wanted as far as whole units allow.

        With `wide`, plans farther from these proportions are tried, too, where none near them meets it.
        """
        if target >= 1:
            return {group.name: group.units for group in self.groups}
        limits = np.concatenate([*self.limits.values(), [1.0]])
        low, high = 1e-9 * float(limits[limits > 0].min()), 2 * float(limits.max())
        for _ in range(200):
            middle = math.sqrt(low) * math.sqrt(high)
            low, high = (low, middle) if self.cost(self.rounded(self.wanted(middle))) <= target else (middle, high)
        kept = self._filled(self.rounded(self.wanted(high)), self.wanted(low), target)
        return kept if self.cost(kept) >= target * (1 - TOLERANCE / 2) else self._exchanged(kept, target, wide=wide)

    def _filled(self, kept: Kept, wanted: Mapping[str, float], target: float) -> Kept:
        """Hand out what rounding left over, one step a group and round, to those furthest below what they wanted."""
        kept = dict(kept)
        while True:
            changed = False
            for group in sorted(self.groups, key=lambda g: kept[g.name] - wanted[g.name]):
                larger = [choice for choice in self.choices(group) if choice > kept[group.name]]
                if larger and self.cost({**kept, group.name: larger[0]}) <= target:
                    kept[group.name] = larger[0]
                    changed = True
            if not changed or self.cost(kept) >= target * (1 - TOLERANCE / 4):
                return kept

    def _exchanged(self, kept: Kept, target: float, *, wide: bool) -> Kept:
        """The plan nearest to `target` among those that move two groups by a few steps; for coarse networks.

        With `wide`, where none of them meets it, by more; where that does not, among all plans, if they are few.
        """
        found = kept
        for reach in REACHES:
            near = {group.name: _near(self.choices(group), kept[group.name], reach) for group in self.groups}
            if reach > REACHES[0] and sum(map(len, near.values())) ** 2 > MOST_MOVES:
                break
            found = self._nearest_of(kept, near, target)
            if not wide or is_met(self.cost(found), target):
                return found
        choices = [self.choices(group) for group in self.groups]
        if math.prod(map(len, choices)) > MOST_PLANS:
            return found
        names = [group.name for group in self.groups]
        plans = (dict(zip(names, units, strict=True)) for units in itertools.product(*choices))
        return min(plans, key=lambda plan: abs(self.cost(plan) - target))

    def _nearest_of(self, kept: Kept, near: Mapping[str, Sequence[int]], target: float) -> Kept:
        """The plan nearest to `target` that has any two groups elsewhere."""
        touched = {
            name: {place for place, layer in enumerate(self.costs) if name in {*layer.outputs, *layer.inputs}}
            for name in near
        }
        removed = self.removed(kept)
        before = [layer.at(removed) for layer in self.costs]
        total = sum(before)

        def missed(moved: Kept) -> float:
            after = removed | {name: removed[name] + kept[name] - left for name, left in moved.items()}
            changed = set().union(*(touched[name] for name in moved))
            return abs(total + sum(self.costs[place].at(after) - before[place] for place in changed) - target)

        moves = (
            {first: one, second: other}
            for first, second in itertools.combinations_with_replacement(near, 2)
            for one in near[first]
            for other in near[second]
        )
        return kept | min(moves, key=missed)


def _choices(group: Group, least: int, round_to: int | None) -> list[int]:
    """Numbers of units that the group may keep, ascending."""
    step = 1 if round_to is None else round_to // math.gcd(round_to, group.repeats)
    multiples = [units for units in range(step, group.units, step) if units >= least]
    return [*multiples, group.units]


def _rounded(wanted: float, choices: Sequence[int]) -> int:
    """The least choice that is not below: a unit goes once all of it is to go."""
    return next(choice for choice in choices if choice >= wanted - 1e-9)


def _near(choices: Sequence[int], current: int, reach: int) -> Sequence[int]:
    """`current` and up to so many choices on either side."""
    index = choices.index(current)
    return choices[max(index - reach, 0) : index + reach + 1]


def _ratio(kept: int, units: int) -> float:
    """The ratio at which Torch-Pruning, which truncates `units · (1 − ratio)`, keeps exactly `kept` units."""
    return 0.0 if kept == units else 1 - (kept + 0.01) / units
