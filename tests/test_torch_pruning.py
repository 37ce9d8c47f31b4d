"""Every way in which Torch-Pruning is used, with our importance and its own, through `pruner_kwargs` and `refresh`."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchattacks
from torch import Tensor, nn

import tp_mrs
from tests.conftest import randomised
from tp_mrs.pruning import prunable_groups

IMAGES, LABELS = torch.rand(4, 3, 32, 32), torch.arange(4)
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": (16, 24, 32, 40)},
    "vgg11_bn": {},
    "mobilevit_xxs": {},
}
PRUNERS: dict[str, Any] = {
    "base": tp.pruner.BasePruner,
    "magnitude": tp.pruner.MagnitudePruner,
    "bn_scale": tp.pruner.BNScalePruner,
    "group_norm": tp.pruner.GroupNormPruner,
    "growing_reg": tp.pruner.GrowingRegPruner,
}
family = pytest.mark.parametrize("architecture", FAMILIES)
importances = pytest.mark.parametrize("importance", ["mrs", "magnitude"])
cases = pytest.mark.parametrize(
    ("architecture", "importance"),
    [("resnet18", "mrs"), ("resnet18", "magnitude"), ("vgg11_bn", "magnitude"), ("mobilevit_xxs", "mrs")],
)


def make(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    arguments = FAMILIES[architecture]
    return randomised(tp_mrs.create_model(architecture, num_classes=4, image_size=32, **arguments))


def mrs(model: nn.Module, **options: Any) -> tp_mrs.MRSImportance:
    return tp_mrs.MRSImportance(model, [(IMAGES, LABELS)], torchattacks.FGSM, progress=False, **options)


def make_importance(name: str, model: nn.Module) -> Any:
    return mrs(model) if name == "mrs" else tp.importance.MagnitudeImportance()


def make_pruner(model: nn.Module, importance: Any, kind: str = "base", **options: Any) -> Any:
    return PRUNERS[kind](model, IMAGES[:1], importance=importance, **options, **tp_mrs.pruner_kwargs(model))


def take_steps(pruner: Any) -> None:
    for _ in range(pruner.iterative_steps):
        pruner.step()
        check_runs(tp_mrs.refresh(pruner.model))


def units(model: nn.Module) -> dict[str, int]:
    """How many channels each coupled group can lose one by one, as Torch-Pruning counts them."""
    return {group.name: group.units for group in prunable_groups(model, IMAGES[:1])}


def asked(channels: int, ratio: float) -> int:
    return int(channels * (1 - ratio))


def check_runs(model: nn.Module) -> None:
    """Forwards and backwards, in training and evaluation; every group still has channels."""
    model.train()
    model.zero_grad()
    logits = model(IMAGES)
    assert logits.shape == (4, 4)
    F.cross_entropy(logits, LABELS).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert bool(model.eval()(IMAGES).isfinite().all())
    assert min(parameter.numel() for parameter in model.parameters()) > 0


# --- what Torch-Pruning overlooks -------------------------------------------------------------------------------------


@importances
def test_frozen_layers_are_pruned_with_what_they_are_coupled_to(importance: str) -> None:
    free, frozen = make("resnet18"), make("resnet18")
    frozen.get_submodule("conv1").requires_grad_(False)
    frozen.get_submodule("layer2").requires_grad_(False)
    for model in (free, frozen):
        make_pruner(model, make_importance(importance, model), global_pruning=True, pruning_ratio=0.4).step()
    assert torch.equal(frozen(IMAGES), free(IMAGES))


# --- which channels compete ------------------------------------------------------------------------------------------


@cases
def test_local_pruning_takes_the_same_from_each(architecture: str, importance: str) -> None:
    model = make(architecture)
    before = units(model)
    take_steps(make_pruner(model, make_importance(importance, model), pruning_ratio=0.3))
    assert units(model) == {name: asked(count, 0.3) for name, count in before.items()}


@cases
@pytest.mark.parametrize("steps", [1, 3])
def test_global_pruning_takes_so_much_in_all(architecture: str, importance: str, steps: int) -> None:
    model = make(architecture)
    before = units(model)
    options: dict[str, Any] = {"global_pruning": True, "pruning_ratio": 0.4, "iterative_steps": steps}
    take_steps(make_pruner(model, make_importance(importance, model), **options))
    after = units(model)
    assert sum(after.values()) == asked(sum(before.values()), 0.4)
    assert len({after[name] / before[name] for name in before}) > 2
    if importance == "mrs":
        assert all(after[name] >= math.ceil(0.1 * before[name]) for name in before)


@cases
def test_isomorphic_pruning_takes_the_same_from_each_kind_of_group(architecture: str, importance: str) -> None:
    model = make(architecture)
    before = units(model)
    pruner = make_pruner(model, make_importance(importance, model), global_pruning=True, isomorphic=True)
    take_steps(pruner)
    scopes = len(pruner._scope_initial_channels)
    assert 1 < scopes < len(before)
    assert 0 <= sum(before.values()) / 2 - sum(units(model).values()) <= scopes


@pytest.mark.parametrize("global_pruning", [False, True])
@importances
def test_scopes_of_the_users_have_their_own_ratios(importance: str, global_pruning: bool) -> None:
    model: Any = make("resnet18")
    before = units(model)
    scope = (model.layer1[0].conv1, model.layer1[1].conv1, model.layer2[0].conv1)
    ratios = {scope: 0.25, model.layer4[0].conv1: 0.8}
    pruner = make_pruner(
        model,
        make_importance(importance, model),
        global_pruning=global_pruning,
        pruning_ratio=0.5,
        pruning_ratio_dict=ratios,
    )
    take_steps(pruner)
    after, together = units(model), ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1")
    rest = set(before) - {*together, "layer4.0.conv1"}
    assert after["layer4.0.conv1"] == asked(before["layer4.0.conv1"], 0.8)
    if global_pruning:
        assert sum(after[name] for name in together) == asked(sum(before[name] for name in together), 0.25)
        assert sum(after[name] for name in rest) == asked(sum(before[name] for name in rest), 0.5)
    else:
        assert all(after[name] == asked(before[name], 0.25) for name in together)
        assert all(after[name] == asked(before[name], 0.5) for name in rest)
    assert list(ratios) == [scope, model.layer4[0].conv1]


# --- how much goes ---------------------------------------------------------------------------------------------------


@importances
def test_round_to_rounds_the_channels_of_each_group_down(importance: str) -> None:
    model = make("resnet18")
    before = units(model)
    take_steps(make_pruner(model, make_importance(importance, model), pruning_ratio=0.3, round_to=8))
    assert units(model) == {name: asked(count, 0.3) // 8 * 8 for name, count in before.items()}


@family
def test_round_to_leaves_multiples_and_spares_no_group(architecture: str) -> None:
    """Rounded down to nothing, a group would be left whole: the least sensitive ones, of all."""
    model: Any = make(architecture)
    before = units(model)
    importance = mrs(model, round_to=8, alpha=2.0)
    typical = importance.sensitivity(IMAGES[:1]).typical
    take_steps(make_pruner(model, importance, global_pruning=True, round_to=8))
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m is not model.get_classifier()]
    assert all(layer.weight.shape[0] % 8 == 0 for layer in layers)
    least = min(typical, key=typical.__getitem__)
    assert units(model)[least] < before[least]


@family
def test_no_group_loses_more_than_min_keep_allows(architecture: str) -> None:
    """In global mode Torch-Pruning's `max_pruning_ratio` alone lets single groups lose more."""
    model = make(architecture)
    before = units(model)
    options: dict[str, Any] = {
        "global_pruning": True,
        "pruning_ratio": 0.7,
        "max_pruning_ratio": 0.8,
        "iterative_steps": 3,
    }
    take_steps(make_pruner(model, mrs(model, min_keep=0.2, alpha=2.0), **options))
    kept = {name: count / before[name] for name, count in units(model).items()}
    assert min(kept.values()) >= 0.2
    assert sorted(kept.values())[1] < 0.3


# --- the user's hand in it -------------------------------------------------------------------------------------------


@cases
def test_interactive_pruning_leaves_what_the_user_leaves(architecture: str, importance: str) -> None:
    model = make(architecture)
    before = units(model)
    names = {module: name for name, module in model.named_modules()}
    pruner = make_pruner(model, make_importance(importance, model), pruning_ratio=0.5)
    spared: set[str] = set()
    for index, group in enumerate(pruner.step(interactive=True)):
        if index % 3 == 1:
            spared |= {names[item.dep.target.module] for item in group if item.dep.target.module in names}
        else:
            group.prune()
    check_runs(tp_mrs.refresh(model))
    after = units(model)
    whole = {name for name in before if after[name] == before[name]}
    assert whole
    assert whole <= spared
    assert all(after[name] == asked(before[name], 0.5) for name in before if name not in whole)


@pytest.mark.parametrize("architecture", ["resnet18", "mobilevit_xxs"])
def test_two_pruners_take_turns_without_leaking(architecture: str) -> None:
    """In turns, each model ends up as if the other were not there; Torch-Pruning's shared defaults stay as they are."""

    def defaults() -> dict[str, Any]:
        parameters = inspect.signature(tp.pruner.BasePruner).parameters.values()
        return {p.name: dict(p.default) for p in parameters if isinstance(p.default, dict)}

    before = defaults()
    alone, *both = (make(architecture) for _ in range(3))
    options: dict[str, Any] = {"global_pruning": True, "iterative_steps": 2}
    take_steps(make_pruner(alone, mrs(alone), **options))
    pruners = [make_pruner(model, mrs(model), **options) for model in both]
    for _ in range(2):
        for pruner in pruners:
            pruner.step()
            check_runs(tp_mrs.refresh(pruner.model))
    for pruner in pruners:
        own = set(pruner.model.modules())
        for kept in (pruner.num_heads, pruner.in_channel_groups, pruner.out_channel_groups):
            assert set(kept) <= own
        torch.testing.assert_close(pruner.model.state_dict(), alone.state_dict(), rtol=0, atol=0)
    assert defaults() == before


# --- pruners that regularise while training --------------------------------------------------------------------------


def regularised_step(pruner: Any, model: nn.Module) -> int:
    """One step of training with the pruner's regulariser; the number of parameters whose gradients it changed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(IMAGES), LABELS).backward()
    before = {name: gradient_of(parameter).clone() for name, parameter in model.named_parameters()}
    pruner.regularize(model)
    assert all(module.training for module in model.modules())
    after = {name: gradient_of(parameter) for name, parameter in model.named_parameters()}
    assert all(bool(gradient.isfinite().all()) for gradient in after.values())
    optimizer.step()
    return sum(not torch.equal(before[name], after[name]) for name in before)


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@cases
@pytest.mark.parametrize("kind", ["bn_scale", "group_norm", "growing_reg"])
def test_regularising_pruners_in_a_training_loop(architecture: str, importance: str, kind: str) -> None:
    model = make(architecture)
    before = units(model)
    pruner = make_pruner(model, make_importance(importance, model), kind, iterative_steps=2, reg=1e-2)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for _ in range(2):
        assert regularised_step(pruner, model) >= norms
        if kind == "growing_reg":
            pruner.update_reg()
            assert regularised_step(pruner, model) >= norms
        pruner.step()
        check_runs(tp_mrs.refresh(model))
        pruner.update_regularizer()
    assert units(model) == {name: asked(count, 0.5) for name, count in before.items()}
    assert regularised_step(pruner, model) >= norms


@importances
@pytest.mark.parametrize("kind", PRUNERS)
def test_every_pruner_agrees_without_regularising(kind: str, importance: str) -> None:
    model, reference = make("resnet18"), make("resnet18")
    for pruned, pruner in ((model, kind), (reference, "base")):
        options: dict[str, Any] = {"global_pruning": True, "pruning_ratio": 0.5}
        take_steps(make_pruner(pruned, make_importance(importance, pruned), pruner, **options))
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=0, atol=0)
