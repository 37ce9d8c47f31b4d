"""One step of pruning: measure the model, plan the whole way to a goal, go part of it, and mend what that breaks."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any

from torch import Tensor, nn

from .allocation import Kept, Planner, is_met, losses_of, ratios_of
from .borrowing import preserved_rng
from .compensation import step_with
from .errors import naming
from .importance import MRSImportance
from .pruning import prunable_groups, prune_by_ratio, width
from .sensitivity import Sensitivity


@dataclass(frozen=True)
class Step:
    """What a step of a round did, as its checkpoint holds it.

    Attributes:
        plan: group → units to keep of it at the end of the round.
        kept: group → fraction of its units that the step kept.
        widths: group → output channels of its root before and after the step.
        reached: what the pruned model has of the budget's measure.
        sensitivity: of the model before the step.
        pruned: evaluation after the last step of a round.
    """

    plan: Kept
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
        measure: what the goal counts.
        least: units that stay of each of the dense model's groups.
        ignored: layers that keep their outputs.
    """

    model: nn.Module
    example_inputs: Tensor
    importance: Callable[[], MRSImportance]
    settle: Callable[[], nn.Module]
    compensate: bool
    source: str
    measure: str
    alpha: float
    least: Kept
    round_to: int | None
    ignored: Sequence[nn.Module]
    seed: int

    def step(self, goal: float, part: float, planned: Kept | None, final: float | None) -> Step:
        """Go part of the way to the goal.

        Args:
            goal: so much of the measure is to be left.
            part: how much of the way, from 0 to 1.
            planned: what the step before, of the same round, meant to keep in the end.
            final: in the first step, the fraction that is to be left in the end.

        Raises:
            InputError: whole channels can't meet the final budget; nothing was changed.
        """
        scores = self.importance()
        with naming(self.source):
            measurement = scores.measurement()
        groups = prunable_groups(self.model, self.example_inputs, self.ignored)
        sensitivity = measurement.sensitivity(groups)
        alone = len(self.least) - len(groups)
        planner = Planner(self.model, self.example_inputs, groups, self.measure, self.least, self.round_to, alone)
        units = {group.name: group.units for group in groups}
        plan = self._plan(planner, sensitivity, goal / planner.whole, planned, final)
        kept = planner.part_of_the_way(plan, part)
        before = self._widths(units)
        if kept != units:
            ratios = ratios_of(self.model, groups, kept)
            step = partial(step_with, moments=measurement.moments) if self.compensate else methodcaller("step")
            with preserved_rng(self.model, self.seed):  # a base may draw
                prune_by_ratio(self.model, self.example_inputs, ratios, scores.base_scores, step)
            with naming(self.source):
                self.settle()
        after = self._widths(units)
        return Step(
            plan,
            {name: kept[name] / units[name] for name in units},
            {name: (before[name], after[name]) for name in before},
            planner.amount(self.model, kept),
            sensitivity.to_dict(),
        )

    def _plan(
        self, planner: Planner, sensitivity: Sensitivity, goal: float, planned: Kept | None, final: float | None
    ) -> Kept:
        """What each group is to keep at the goal, a fraction of what the model has now."""
        losses, fraction = losses_of(self.model, sensitivity, planner.groups), min(goal, 1.0)
        if final is not None:
            plan = planner.plan(losses, final, self.alpha)
            if math.isclose(fraction, final):
                return plan
        plan, left = planner.nearest(losses, fraction, self.alpha)
        if planned is not None and not is_met(left, fraction):
            return planned  # with few channels left to choose from, it may be the only one that meets the goal
        return plan

    def _widths(self, names: Container[str]) -> dict[str, int]:
        """Output channels of the root of each group, in the order of the network."""
        return {name: width(module, "out") for name, module in self.model.named_modules() if name in names}
