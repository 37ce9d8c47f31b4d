"""One step of pruning: measure the model, plan the whole way to a goal, go part of it, and mend what that breaks."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import methodcaller
from typing import Any

from torch import Tensor, nn

from .allocation import Kept, Losses, Planner, is_met, least_units, losses_of, ratios_of
from .borrowing import preserved_rng
from .compensation import step_with
from .errors import naming
from .importance import MRSImportance
from .pruning import Group, groups_left, prune_by_ratio, width


@dataclass(frozen=True)
class Step:
    """What a step of a round did, as its checkpoint holds it. Units are those of the dense model's groups.

    Attributes:
        goal: what was to be left of the budget's measure at the end of the round.
        plan: group → units to keep of it for that.
        final: group → units with which the budget is met in the end, as planned in the first step of all.
        units: group → units that the model has now.
        kept: group → fraction of its units that the step kept.
        widths: group → output channels of its root before and after the step.
        reached: what the pruned model has of the measure.
        sensitivity: of the model before the step.
        pruned: evaluation after the last step of a round.
    """

    goal: float
    plan: Kept
    final: Kept
    units: Kept
    kept: dict[str, float]
    widths: dict[str, tuple[int, int]]
    reached: int
    sensitivity: dict[str, Any]
    pruned: dict[str, Any] | None = None


@dataclass(frozen=True)
class Pruning:
    """Measures the model and prunes it part of the way to a goal.

    Attributes:
        importance: makes one for the model as it is then.
        settle: sets BatchNorm's statistics.
        compensate: let layers make up for what they lose.
        source: the name of the argument that the measured images come from.
        dense: the groups that the model had at first.
        measure: what goals count.
        target: so much of it is to be left in the end.
        min_keep: least fraction of the dense model's units that a group keeps.
        ignored: layers that keep their outputs.
    """

    model: nn.Module
    example_inputs: Tensor
    importance: Callable[[], MRSImportance]
    settle: Callable[[], nn.Module]
    compensate: bool
    source: str
    dense: Sequence[Group]
    measure: str
    target: float
    alpha: float
    min_keep: float
    round_to: int | None
    ignored: Sequence[nn.Module]
    seed: int

    def step(self, goal: float, part: float, before: Step | None) -> Step:
        """Go part of the way to the goal.

        Args:
            goal: so much of the measure is to be left.
            part: how much of the way, from 0 to 1.
            before: the step before, if there was one.

        Raises:
            InputError: whole channels can't meet the budget; nothing was changed.
        """
        found = groups_left(self.model, self.example_inputs, self.ignored)
        groups = self._with_units_to_lose(found)
        if before and not groups:
            return replace(before, goal=goal, kept={}, widths={})
        scores = self.importance()
        with naming(self.source):
            measurement = scores.measurement()
        sensitivity = measurement.sensitivity(found)
        there = before.units if before else {group.name: group.units for group in self.dense}
        units = {group.name: group.units for group in groups}
        alone = sum(count for name, count in there.items() if name not in units)
        least = least_units(self.dense, self.min_keep)
        planner = Planner(self.model, self.example_inputs, groups, self.measure, least, self.round_to, alone)
        plan, final = self._plan(planner, losses_of(self.model, sensitivity, found), goal, before)
        kept = planner.part_of_the_way(plan, part)
        widths = self._widths(units)
        if kept != units:
            ratios = ratios_of(self.model, groups, kept)
            step = partial(step_with, moments=measurement.moments) if self.compensate else methodcaller("step")
            with preserved_rng(self.model, self.seed):  # a base may draw
                prune_by_ratio(self.model, self.example_inputs, ratios, scores.base_scores, step)
            with naming(self.source):
                self.settle()
        after = self._widths(units)
        return Step(
            goal,
            plan,
            final,
            {**there, **kept},
            {name: kept[name] / units[name] for name in units},
            {name: (widths[name], after[name]) for name in widths},
            planner.amount(self.model, kept),
            sensitivity.to_dict(),
        )

    def _with_units_to_lose(self, groups: Sequence[Group]) -> list[Group]:
        """Those whose units are still the dense model's.

        A grouped convolution with one channel left in each group is a depthwise one to Torch-Pruning, which then takes
        its channels for units.
        """
        repeats = {group.name: group.repeats for group in self.dense}
        return [group for group in groups if group.repeats == repeats.get(group.name)]

    def _plan(self, planner: Planner, losses: Losses, goal: float, before: Step | None) -> tuple[Kept, Kept]:
        """What each group is to keep at the goal, and in the end.

        Until the last round no group goes below what the first step of all meant to keep in the end, so that the budget
        can still be met; there, and within a round, an earlier plan stands where a new one misses the goal, as may be
        with few channels left to choose from.
        """
        fraction, last = min(goal / planner.whole, 1.0), goal == self.target
        if before is None:
            final = planner.plan(losses, fraction if last else self.target / planner.whole, self.alpha)
            if last:
                return final, final
        else:
            final = before.final
        if not last:
            planner = replace(planner, least=final)
        plan, left = planner.nearest(losses, fraction, self.alpha)
        earlier = before.plan if before and before.goal == goal else final if last else None
        return (plan if is_met(left, fraction) or earlier is None else earlier), final

    def _widths(self, names: Container[str]) -> dict[str, int]:
        """Output channels of the root of each group, in the order of the network."""
        return {name: width(module, "out") for name, module in self.model.named_modules() if name in names}
