"""allocate: budgets met by exact count, limiting cases, and refusals."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch_pruning as tp
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from tests.conftest import image_batches, small_cnn, small_resnet, unchanged
from tp_mrs import InputError, Sensitivity, allocate, measure_sensitivity, pruner_kwargs, refresh
from tp_mrs.allocation import LayerCost, Planner, _Plan, amount, least_units, losses_of
from tp_mrs.costs import costs_of
from tp_mrs.pruning import Group, prunable_groups, prune_by_ratio

SIDES = {"small_resnet": 32, "vgg11_bn": 32, "mobilevit_xxs": 64}


@cache
def subject(name: str) -> tuple[nn.Module, torch.Tensor, Sensitivity]:
    torch.manual_seed(0)
    model = small_resnet() if name == "small_resnet" else timm.create_model(name, num_classes=4)
    if name == "vgg11_bn":
        from tp_mrs import create_model

        model = create_model(name, num_classes=4, image_size=32)
    example = torch.rand(1, 3, SIDES[name], SIDES[name])
    data = image_batches(1, 4, SIDES[name])
    return model, example, measure_sensitivity(model, data, torchattacks.FGSM, example_inputs=example)


def pruned_by_hand(model: nn.Module, example: torch.Tensor, ratios: dict[nn.Module, float]) -> nn.Module:
    """A copy, pruned as a user of Torch-Pruning would."""
    names = {module: name for name, module in model.named_modules()}
    other = copy.deepcopy(model)
    modules = dict(other.named_modules())
    pruner = tp.pruner.BasePruner(
        other,
        example,
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio_dict={modules[names[module]]: ratio for module, ratio in ratios.items()},
        **pruner_kwargs(other),
    )
    pruner.step()
    return refresh(other)


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize(
    "budget", [{"macs": 0.5}, {"macs": 0.25}, {"params": 0.4}, {"channels": 0.6}, {"macs": 0.8, "round_to": 2}]
)
def test_the_budget_is_met_within_a_hundredth(name: str, budget: dict[str, Any]) -> None:
    model, example, sensitivity = subject(name)
    with unchanged(model):
        ratios = allocate(model, example, sensitivity, **budget)
    measure, target = next(iter(budget.items()))
    pruned = pruned_by_hand(model, example, ratios)
    assert amount(pruned, example, measure) / amount(model, example, measure) == pytest.approx(target, rel=0.01)
    assert pruned(example).shape == (1, 4)


def test_sensitive_groups_keep_more() -> None:
    model, example, sensitivity = subject("vgg11_bn")
    raised = "features.11"
    names = {module: name for name, module in model.named_modules()}
    ratios = [
        {names[module]: ratio for module, ratio in allocate(model, example, scores, macs=0.4).items()}
        for scores in (sensitivity.typical, {**sensitivity.typical, raised: 3 * sensitivity.typical[raised]})
    ]
    assert ratios[1][raised] < ratios[0][raised]
    assert all(
        after >= before
        for name in ratios[0]
        if name != raised
        for before, after in [(ratios[0][name], ratios[1][name])]
    )


@pytest.mark.parametrize("name", ["small_resnet", "vgg11_bn"])
def test_alpha_zero_is_uniform(name: str) -> None:
    model, example, sensitivity = subject(name)
    ratios = allocate(model, example, sensitivity, macs=0.5, alpha=0.0)
    units = [module.out_channels for module in ratios if isinstance(module, nn.Conv2d)]
    assert max(ratios.values()) - min(ratios.values()) < 1.1 / min(units) + 0.01


def test_the_whole_model_needs_no_pruning() -> None:
    model, example, sensitivity = subject("small_resnet")
    assert set(allocate(model, example, sensitivity, macs=1.0).values()) == {0.0}


def test_min_keep_is_kept() -> None:
    model, example, sensitivity = subject("vgg11_bn")
    ratios = allocate(model, example, sensitivity, macs=0.3, alpha=3.0, min_keep=0.25)
    assert max(ratios.values()) <= 0.75


def test_round_to_leaves_multiples() -> None:
    model, example, sensitivity = subject("vgg11_bn")
    pruned = pruned_by_hand(model, example, allocate(model, example, sensitivity, macs=0.5, round_to=8))
    assert all(m.out_channels % 8 == 0 for m in pruned.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "macs, params, channels: give exactly one budget.*got none"),
        ({"macs": 0.5, "params": 0.5}, "give exactly one budget.*got macs, params"),
        ({"macs": 0}, r"macs: expected a number in \(0, 1\], got 0"),
        ({"macs": 1.2}, r"macs: expected a number in \(0, 1\], got 1.2"),
        ({"params": float("nan")}, "params"),
        ({"macs": "half"}, "macs"),
        ({"macs": 0.5, "alpha": -1}, "alpha"),
        ({"macs": 0.5, "min_keep": 0}, "min_keep"),
        ({"macs": 0.5, "round_to": 0}, "round_to"),
        ({"macs": 0.001}, "macs=0.001: can't be met within 1%; the nearest is macs=0.0.*lower min_keep"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model, example, sensitivity = subject("small_resnet")
    with unchanged(model), pytest.raises(InputError, match=message):
        allocate(model, example, sensitivity, **arguments)


def test_a_sensitivity_of_another_model() -> None:
    _, example, sensitivity = subject("small_resnet")
    with pytest.raises(InputError, match="sensitivity: its groups are not this model's"):
        allocate(small_cnn(), example, sensitivity, macs=0.5)


def test_a_sensitivity_from_before_pruning() -> None:
    model, example, sensitivity = subject("small_resnet")
    pruned = pruned_by_hand(model, example, allocate(model, example, sensitivity, macs=0.8))
    with pytest.raises(InputError, match=r"sensitivity: it was measured when \S+ had \d+ weights"):
        allocate(pruned, example, sensitivity, macs=0.5)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "sensitivity: expected what measure_sensitivity returns, or a score for each .*, got list"),
        ({"0": 1.0, "a": 2.0}, r"sensitivity: its groups are not this model's \(missing: 3; unknown: a\)"),
        ({"0": 1.0, "3": "much"}, r"sensitivity\['3'\]: expected a number >= 0, got nan"),
    ],
)
def test_scores_that_are_none(scores: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        allocate(small_cnn(), torch.rand(1, 3, 16, 16), scores, macs=0.5)


def test_scores_of_ones_own() -> None:
    model, example, sensitivity = subject("vgg11_bn")
    tensors: Any = {name: torch.tensor(score, dtype=torch.float64) for name, score in sensitivity.typical.items()}
    assert allocate(model, example, tensors, macs=0.5) == allocate(model, example, sensitivity.typical, macs=0.5)
    first = next(iter(sensitivity.groups))
    with pytest.raises(InputError, match=f"sensitivity\\['{first}'\\]: expected a number >= 0, got -1"):
        allocate(model, example, {**sensitivity.typical, first: -1}, macs=0.5)


def test_units_that_share_evenly_rising_count_as_a_score_of_the_group() -> None:
    model, example, sensitivity = subject("vgg11_bn")
    units = {
        name: tuple(math.sqrt(sensitivity.typical[name] * (k + 1)) / len(own) for k in range(len(own)))
        for name, own in sensitivity.units.items()
    }
    even = replace(sensitivity, units=units)
    ratios = [allocate(model, example, scores, macs=0.5, alpha=0.7) for scores in (even, sensitivity.typical)]
    assert list(ratios[0].values()) == pytest.approx(list(ratios[1].values()), abs=0.02)


def test_groups_lose_the_units_that_hardly_matter() -> None:
    """With half of the units of each group ten thousand times as sensitive, and alike otherwise, the others go."""
    model, example, sensitivity = subject("vgg11_bn")
    units = {name: tuple(1.0 if k % 2 else 1e-4 for k in range(len(own))) for name, own in sensitivity.units.items()}
    ratios = allocate(model, example, replace(sensitivity, units=units), macs=0.26, alpha=1)
    assert max(ratios.values()) == pytest.approx(0.5, abs=0.01)


def test_zero_sensitivity_everywhere_leaves_cost_alone_to_decide() -> None:
    model, example, sensitivity = subject("vgg11_bn")
    silent, alike = (dict.fromkeys(sensitivity.groups, value) for value in (0.0, 1.0))
    assert allocate(model, example, silent, macs=0.5) == allocate(model, example, alike, macs=0.5)


# --- the model that is left -------------------------------------------------------------------------------------


def chain(*widths: int) -> nn.Sequential:
    """Convolutions of these widths, and a classifier."""
    sizes = itertools.pairwise((3, *widths))
    layers = [layer for size in sizes for layer in (nn.Conv2d(*size, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


def planner_for(model: nn.Module, example: torch.Tensor, measure: str, min_keep: float = 0.1) -> Planner:
    groups = prunable_groups(model, example)
    return Planner(model, example, groups, measure, least_units(groups, min_keep), None)


@pytest.mark.parametrize("measure", ["macs", "params", "channels"])
@pytest.mark.parametrize("name", SIDES)
def test_what_a_unit_saves_is_what_pruning_it_saves(name: str, measure: str) -> None:
    model, example, sensitivity = subject(name)
    planner = planner_for(model, example, measure)
    costs = costs_of(model, example, planner.groups, measure)
    losses = {group.name: np.square(np.sort(sensitivity.units[group.name])) for group in planner.groups}
    plan = _Plan(planner.groups, costs, losses, 0.5, planner.least, None)
    whole = {group.name: group.units for group in planner.groups}
    for group in planner.groups[:: 1 + len(planner.groups) // 12]:
        kept = {**whole, group.name: group.units - 1}
        assert plan.cost(whole) - plan.cost(kept) == pytest.approx(1 - planner.left(kept), rel=0.03), group.name


def test_a_group_of_one_unit_still_counts_as_a_channel() -> None:
    model, example = chain(8, 10), torch.rand(1, 3, 8, 8)
    ratios = allocate(model, example, {"0": 1.0, "2": 1e9}, channels=0.5, alpha=1.0, min_keep=0.01)
    pruned = pruned_by_hand(model, example, ratios)
    assert sum(layer.out_channels for layer in pruned.modules() if isinstance(layer, nn.Conv2d)) == 9


def test_the_nearest_plan_is_found_where_none_meets_the_budget() -> None:
    model, example = chain(2, 3), torch.rand(1, 3, 8, 8)
    planner = planner_for(model, example, "params")
    possible = {(one, two): planner.left({"0": one, "2": two}) for one in (1, 2) for two in (1, 2, 3)}
    target = 0.6
    nearest = min(possible, key=lambda kept: abs(possible[kept] - target))
    assert abs(possible[nearest] - target) > 0.01 * target
    losses = losses_of(model, {"0": 1.0, "2": 1.0}, planner.groups)
    kept, left = planner.nearest(losses, target, 0.5)
    assert left == possible[kept["0"], kept["2"]] == possible[nearest]
    with pytest.raises(InputError, match=f"params=0.6: can't be met within 1%; the nearest is params={left:.4f}"):
        planner.plan(losses, target, 0.5)


def test_ignored_layers_keep_their_outputs() -> None:
    model, example, sensitivity = subject("small_resnet")
    spared = model.get_submodule("layer2")
    ratios = allocate(model, example, sensitivity, macs=0.6, ignored_layers=[spared])
    pruned = pruned_by_hand(model, example, ratios)
    assert amount(pruned, example, "macs") / amount(model, example, "macs") == pytest.approx(0.6, rel=0.01)
    for name, layer in spared.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert pruned.get_submodule(f"layer2.{name}").out_channels == layer.out_channels
    with pytest.raises(InputError, match=r"ignored_layers: expected a list of the model's layers.*got Conv2d"):
        allocate(model, example, sensitivity, macs=0.6, ignored_layers=[nn.Conv2d(1, 1, 1)])
    with pytest.raises(InputError, match=r"ignored_layers: expected a list of the model's layers.*got 'layer2'"):
        allocate(model, example, sensitivity, macs=0.6, ignored_layers="layer2")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"ignored_layers: without these there is nothing to prune"):
        allocate(model, example, sensitivity, macs=0.6, ignored_layers=[model])


# --- the plan itself, on made-up networks ------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> _Plan:
    """A chain of layers with random widths and scores."""
    units = draw(st.lists(st.integers(2, 64), min_size=2, max_size=6))
    groups = [Group(f"g{i}", width, 1, (), ()) for i, width in enumerate(units)]
    full = draw(st.lists(st.floats(0.1, 1.0), min_size=len(units) + 1, max_size=len(units) + 1))
    costs = []
    for i, size in enumerate(full):
        outputs = {f"g{i}": 1 / units[i]} if i < len(units) else {}
        inputs = {f"g{i - 1}": 1 / units[i - 1]} if i else {}
        costs.append(LayerCost(size / sum(full), outputs, inputs))
    losses = {g.name: np.sort(draw(arrays(float, g.units, elements=st.floats(0, 10.0)))) for g in groups}
    return _Plan(groups, costs, losses, draw(st.floats(0, 2)), least_units(groups, draw(st.floats(0.01, 0.5))), None)


@settings(max_examples=150, deadline=None)
@given(plan=plans(), target=st.floats(0.05, 1.0))
def test_a_plan_stays_within_its_budget_and_bounds(plan: _Plan, target: float) -> None:
    kept = plan.solve(target)
    smallest = {group.name: plan.choices(group)[0] for group in plan.groups}
    step = max(plan.cost(kept) - plan.cost({**kept, group.name: max(kept[group.name] - 1, 1)}) for group in plan.groups)
    assert plan.cost(kept) <= target + step + 1e-9 or kept == smallest
    for group in plan.groups:
        assert plan.least[group.name] <= kept[group.name] <= group.units


@settings(max_examples=100, deadline=None)
@given(plan=plans(), low=st.floats(0.1, 10.0), factor=st.floats(1.0, 10.0))
def test_a_higher_level_never_costs_more(plan: _Plan, low: float, factor: float) -> None:
    costs = [plan.cost(plan.rounded(plan.wanted(level))) for level in (low, low * factor)]
    assert costs[0] >= costs[1] - 1e-12


def test_fractions_by_hand() -> None:
    # A chain of three layers with 1/4, 1/2 and 1/4 of the MACs, so that 3/4 hang on either group's channels. With
    # r0 = 2 r1 the MACs left are 1 - 3/4 (r0 + r1) + 1/2 r0 r1 = 1 - 9/4 r1 + r1².
    groups = [Group("g0", 1000, 1, (), ()), Group("g1", 1000, 1, (), ())]
    costs = [
        LayerCost(0.25, {"g0": 0.001}, {}),
        LayerCost(0.5, {"g1": 0.001}, {"g0": 0.001}),
        LayerCost(0.25, {}, {"g1": 0.001}),
    ]
    rising = np.arange(1, 1001) / 1000
    kept = _Plan(groups, costs, {"g0": rising, "g1": 2 * rising}, 1.0, {"g0": 100, "g1": 100}, None).solve(0.6)
    expected = (2.25 - math.sqrt(2.25**2 - 4 * 0.4)) / 2
    assert [1 - kept[name] / 1000 for name in ("g0", "g1")] == pytest.approx([2 * expected, expected], abs=0.002)


@settings(max_examples=100, deadline=None)
@given(plan=plans(), level=st.floats(1e-3, 1e3))
def test_no_exchange_of_units_lowers_the_loss(plan: _Plan, level: float) -> None:
    """For what they save at first: each unit that goes costs less for it than each that stays."""
    plan = replace(plan, alpha=1.0)
    whole = {group.name: group.units for group in plan.groups}
    gone, stay = [0.0], [math.inf]
    for group in plan.groups:
        saved = plan.cost(whole) - plan.cost({**whole, group.name: group.units - 1})
        removed = group.units - math.ceil(plan.wanted(level)[group.name] - 1e-9)
        ratios = plan.losses[group.name] / saved
        gone += ratios[:removed].tolist()
        stay += ratios[removed + 1 :].tolist()  # the one between may be split
    assert max(gone) <= min(stay) * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(plan=plans(), level=st.floats(0, 1))
def test_alpha_zero_takes_the_same_fraction_of_all(plan: _Plan, level: float) -> None:
    wanted = replace(plan, alpha=0.0).wanted(level)
    assert [wanted[group.name] / group.units for group in plan.groups] == pytest.approx([1 - level] * len(plan.groups))


@settings(max_examples=100, deadline=None)
@given(plan=plans())
def test_nothing_removed_costs_everything(plan: _Plan) -> None:
    assert plan.cost({group.name: group.units for group in plan.groups}) == pytest.approx(1.0)


@settings(max_examples=100, deadline=None)
@given(plan=plans(), level=st.floats(1e-3, 1e3))
def test_a_unit_goes_once_its_price_is_reached(plan: _Plan, level: float) -> None:
    kept = plan.rounded(plan.wanted(level))
    for group in plan.groups:
        due = int(np.count_nonzero(plan.limits[group.name][1:] <= level))
        assert kept[group.name] == max(group.units - due, plan.least[group.name])


# --- steps towards a plan ----------------------------------------------------------------------------------------


def planner_of(groups: list[Group], round_to: int | None = None) -> Planner:
    return Planner(nn.Identity(), torch.zeros(1), groups, "macs", least_units(groups, 0.1), round_to)


def test_steps_towards_a_plan_by_hand() -> None:
    groups = [Group("narrow", 64, 1, (), ()), Group("whole", 10, 1, (), ()), Group("heads", 32, 4, (), ())]
    plan, any_number = {"narrow": 4, "whole": 10, "heads": 8}, planner_of(groups)
    assert any_number.part_of_the_way(plan, 0.5) == {"narrow": 16, "whole": 10, "heads": 16}
    assert any_number.part_of_the_way(plan, 0.25) == {"narrow": 32, "whole": 10, "heads": 23}  # 32 · (1/4)^¼ = 22.6
    assert any_number.part_of_the_way(plan, 1.0) == plan
    eighths = planner_of(groups, round_to=8)
    assert eighths.part_of_the_way(plan, 0.25) == {"narrow": 32, "whole": 10, "heads": 24}  # of 4 heads, 2 are 8


@given(units=st.integers(1, 2000), left=st.integers(1, 10), data=st.data())
def test_steps_end_at_the_plan(units: int, left: int, data: st.DataObject) -> None:
    plan = data.draw(st.integers(1, units))
    widths = [units]
    for rest in range(left, 0, -1):
        planner = planner_of([Group("g", widths[-1], 1, (), ())])
        widths.append(planner.part_of_the_way({"g": plan}, 1 / rest)["g"])
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == plan


def test_a_budget_is_refused_only_if_no_plan_meets_it() -> None:
    """Two wide steps of widths, all of which are tried by hand: params = 257 a + a b + 11 b + 10, as 256 inputs are."""
    sizes = nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)
    model, example = nn.Sequential(nn.Flatten(), *sizes), torch.zeros(1, 1, 16, 16)
    possible = {257 * a + a * b + b + 10 * b + 10 for a in range(4, 33) for b in range(3, 25)}
    whole = max(possible)
    for target in np.arange(0.2, 1.0, 0.02).round(2):
        reachable = any(abs(params / whole - target) <= 0.01 * target for params in possible)
        try:
            ratios = allocate(model, example, {"1": 1.0, "3": 1.0}, params=target)
        except InputError:
            assert not reachable
            continue
        assert reachable
        pruned = copy.deepcopy(model)
        prune_by_ratio(pruned, example, {pruned[index]: ratios[model[index]] for index in (1, 3)})
        assert amount(pruned, example, "params") / whole == pytest.approx(target, rel=0.01)


def test_few_plans_are_all_tried() -> None:
    """In multiples of 8 it takes three groups to move."""
    convolutions = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2)]
    model = nn.Sequential(*convolutions, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    example = torch.zeros(1, 3, 16, 16)
    whole, pruned = amount(model, example, "macs"), copy.deepcopy(model)
    prune_by_ratio(pruned, example, {pruned[2]: 0.49, pruned[4]: 0.124})
    assert [module.out_channels for module in pruned if isinstance(module, nn.Conv2d)] == [32, 32, 56]
    target = amount(pruned, example, "macs") / whole
    ratios = allocate(model, example, {"0": 1.0, "2": 1.0, "4": 1.0}, macs=target, round_to=8)
    met = copy.deepcopy(model)
    prune_by_ratio(met, example, {met[int(name)]: ratios[model[int(name)]] for name in ("0", "2", "4")})
    assert amount(met, example, "macs") / whole == pytest.approx(target, rel=0.01)
