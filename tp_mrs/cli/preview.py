"""What `tp-mrs prune` would prune and what it would cost, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from tp_mrs.allocation import allocate
from tp_mrs.attacks import parse_name
from tp_mrs.borrowing import copied
from tp_mrs.counting import count
from tp_mrs.objectives import OBJECTIVES
from tp_mrs.pruning import prunable_groups, prune_by_ratio, width
from tp_mrs.sensitivity import Sensitivity

FORWARD = 1 / 3
"""A pass forward alone, as part of one forward and backward."""


@dataclass(frozen=True)
class Fate:
    """What would become of a group: its typical sensitivity (None if unknown), and its root layer's channels."""

    sensitivity: float | None
    ratio: float
    before: int
    after: int


@dataclass(frozen=True)
class Preview:
    """What a run would do.

    Attributes:
        groups: name of each group → what would become of it.
        macs, params: of the model, before and after.
        passes: part of the run → about how many passes over the training images it takes, each forward and backward.
        train_images: how many these are.
        notes: what else to know, a sentence each.
    """

    groups: Mapping[str, Fate]
    macs: tuple[int, int]
    params: tuple[int, int]
    passes: Mapping[str, float]
    train_images: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        name_width = max(map(len, [*self.groups, "group"]))
        lines = [f"{'group':<{name_width}}  typical sensitivity  channels removed  before → after"]
        for name, fate in self.groups.items():
            score = "unknown" if fate.sensitivity is None else f"{fate.sensitivity:.3g}"
            lines.append(
                f"{name:<{name_width}}  {score:>19}  {fate.ratio:>16.0%}  {fate.before:>6} → {fate.after:<5}".rstrip()
            )
        for name, (before, after) in {"MACs": self.macs, "params": self.params}.items():
            lines.append(f"{name}: {before / 1e6:.3f} M → {after / 1e6:.3f} M ({after / before:.1%})")
        lines.append(f"Passes over the {self.train_images:,} training images, forward and backward, about:")
        part_width = max(map(len, self.passes))
        lines += [f"  {part:<{part_width}}  {passes:>7.1f}" for part, passes in self.passes.items()]
        return "\n".join([*lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        return {"format": "tp_mrs.preview/1", **asdict(self)}


def fates(
    model: nn.Module, example_inputs: Tensor, sensitivity: Sensitivity | None, *, alpha: float, **allocating: Any
) -> tuple[dict[str, Fate], nn.Module]:
    """What would become of each group, and the pruned copy of the model; without sensitivity, ratios are uniform.

    Args:
        model: stays as it is.
        example_inputs: (N, C, H, W), on the model's device.
        sensitivity: of the model, if it has been trained.
        alpha, **allocating: as for `allocate`.

    Raises:
        InputError: as `allocate`.
    """
    if sensitivity is None:
        alike = dict.fromkeys((group.name for group in prunable_groups(model, example_inputs)), 1.0)
        ratios = allocate(model, example_inputs, alike, alpha=0.0, **allocating)
    else:
        ratios = allocate(model, example_inputs, sensitivity, alpha=alpha, **allocating)
    pruned = copied(model)
    named = {name: module for name, module in model.named_modules() if module in ratios}
    prune_by_ratio(pruned, example_inputs, {pruned.get_submodule(name): ratios[root] for name, root in named.items()})
    found = {}
    for name, root in named.items():
        score = None if sensitivity is None else sensitivity.typical[name]
        found[name] = Fate(score, ratios[root], width(root, "out"), width(pruned.get_submodule(name), "out"))
    return found, pruned


def preview(
    model: nn.Module,
    example_inputs: Tensor,
    sensitivity: Sensitivity | None,
    *,
    passes: Mapping[str, float],
    train_images: int,
    notes: Iterable[str] = (),
    **allocating: Any,
) -> Preview:
    """The `Preview` of pruning `model`, which stays as it is; arguments as for `fates` and `Preview`."""
    groups, pruned = fates(model, example_inputs, sensitivity, **allocating)
    before, after = (count(each, example_inputs) for each in (model, pruned))
    macs, params = (before.macs, after.macs), (before.params, after.params)
    return Preview(groups, macs, params, passes, train_images, tuple(notes))


def attack_passes(name: str) -> float:
    """About how often an attack by this name runs the model on each image; at most, if it stops when it succeeds.

    >>> attack_passes("pgd-20x5"), attack_passes("none")
    (100.0, 0.0)
    """
    parsed = parse_name(name)
    once = {
        "VANILA": 0.0,
        "Square": parsed.steps * FORWARD,
        "AutoAttack": parsed.steps * (1 + 9 + 9) + 5000 * FORWARD,  # APGD; APGD-T and FAB-T at nine classes; Square
    }
    return once.get(parsed.kind, float(parsed.steps)) * parsed.restarts


def training_passes(objective: str, attack: str | None) -> float:
    """About how many passes one epoch takes, of an objective by name and the attack in place of its own.

    >>> training_passes("pgd", None), training_passes("trades-awp", "tpgd-7")
    (8.0, 11.0)
    """
    name = objective.removesuffix("-awp")
    loss = 2 if name in ("trades", "mart") else 1  # clean and attacked images
    return attack_passes(attack or OBJECTIVES[name].attack) + loss * (1 if name == objective else 2)


def evaluation_passes(attacks: Iterable[str]) -> float:
    """About how many passes one evaluation takes."""
    return FORWARD + sum(attack_passes(attack) + FORWARD for attack in attacks)
