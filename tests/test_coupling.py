"""The proof of coupling: it holds for sound graphs, fails for broken ones, and leaves the model alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tp_mrs
from tests.conftest import small_cnn, small_resnet, unchanged
from tp_mrs import coupling
from tp_mrs.pruning import build_pruner


def family(name: str, side: int) -> tuple[nn.Module, Tensor]:
    return tp_mrs.create_model(name, num_classes=5, image_size=side), torch.rand(1, 3, side, side)


@pytest.mark.parametrize("name", ["resnet18", "mobilevit_xxs", "mobilevitv2_050"])
@pytest.mark.parametrize("side", [32, 64])
def test_the_families_are_proven(name: str, side: int) -> None:
    report = tp_mrs.check_coupling(*family(name, side))
    assert report.proven, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11_bn", "vgg16_bn", "resnet50", "mobilevit_xs", "mobilevit_s", "mobilevitv2_075"])
@pytest.mark.parametrize("side", [32, 64, 224])
def test_the_families_are_proven_at_all_sizes(name: str, side: int) -> None:
    report = tp_mrs.check_coupling(*family(name, side))
    assert report.proven, str(report)


def test_report_of_a_resnet() -> None:
    report = tp_mrs.check_coupling(small_resnet(), torch.rand(1, 3, 32, 32))
    assert sorted(check.units for check in report.checks) == [8] * 3 + [12] * 3 + [16] * 3 + [20] * 3 + [64]
    assert all(check.control > 1e-6 and check.swapped < 1e-12 and check.pruned < 1e-12 for check in report.checks)
    assert str(report).startswith("13 of 13 coupled groups proven")


def test_the_model_is_left_alone() -> None:
    model, images = small_resnet(), torch.rand(1, 3, 32, 32)
    with unchanged(model):
        tp_mrs.check_coupling(model, images)


def test_the_seed_decides() -> None:
    model = small_cnn()
    first, second, third = (tp_mrs.check_coupling(model, torch.rand(1, 3, 16, 16), seed=seed) for seed in (1, 1, 2))
    assert [check.control for check in first.checks] == [check.control for check in second.checks]
    assert [check.control for check in first.checks] != [check.control for check in third.checks]


# --- faults put there on purpose -----------------------------------------------------------------------------------


def with_fault(monkeypatch: pytest.MonkeyPatch, damage: Any) -> tp_mrs.CouplingReport:
    def broken(model: nn.Module, images: Tensor) -> Any:
        pruner = build_pruner(model, images)
        damage(pruner, dict(model.named_modules()))
        return pruner

    monkeypatch.setattr(coupling, "build_pruner", broken)
    return tp_mrs.check_coupling(small_resnet(), torch.rand(1, 3, 32, 32))


def test_a_missing_member_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_the_norm(pruner: Any, modules: dict[str, nn.Module]) -> None:
        node = pruner.DG.module2node[modules["layer2.0.conv1"]]
        node.dependencies = [d for d in node.dependencies if d.target.module is not modules["layer2.0.bn1"]]

    report = with_fault(monkeypatch, forget_the_norm)
    assert [check.group for check in report.faults] == ["layer2.0.conv1"]
    assert not report.proven


def test_shifted_indices_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shift:
        def __init__(self, by: int) -> None:
            self.by = by

        def __call__(self, indices: list[Any]) -> list[Any]:
            return [index._replace(idx=(index.idx + self.by) % 12) for index in indices]

    def shift_the_next_layer(pruner: Any, modules: dict[str, nn.Module]) -> None:
        norm = pruner.DG.module2node[modules["layer2.0.bn1"]]
        (after,) = norm.outputs
        for source, target, by in ((norm, after, 1), (after, norm, -1)):
            for dependency in source.dependencies:
                if dependency.target is target:
                    dependency.index_mapping[0] = Shift(by)

    report = with_fault(monkeypatch, shift_the_next_layer)
    assert [check.group for check in report.faults] == ["layer2.0.conv1"]
    assert report.faults[0].swapped > 1e-3


def test_pruning_the_wrong_channels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is right when it is asked, and wrong when it acts."""
    real = coupling.RootedGroup.of

    def careless(self: Any, pruner: Any, units: Any) -> Any:
        group = real(self, pruner, units)
        layer = dict(pruner.model.named_modules())["layer1.0.conv1"]
        if self.root is layer:
            prune = group.prune
            group.prune = lambda: (
                real(self, pruner, [(u + 1) % self.units for u in units]) if units else prune
            ).prune()
        return group

    monkeypatch.setattr(coupling.RootedGroup, "of", careless)
    report = tp_mrs.check_coupling(small_resnet(), torch.rand(1, 3, 32, 32))
    assert [(check.group, check.fault) for check in report.faults] == [
        ("layer1.0.conv1", "pruning dead channels changes the output")
    ]
    assert report.faults[0].swapped < 1e-12


def test_a_model_that_cannot_run_after_pruning_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "refresh", lambda model: model)
    report = tp_mrs.check_coupling(*family("mobilevit_xxs", 32))
    assert {check.group for check in report.faults} == {
        check.group for check in report.checks if check.group.endswith("qkv")
    }
    assert "RuntimeError" in (report.faults[0].fault or "")


def test_a_group_without_effect_proves_nothing() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            features = self.used(x) + 1e-18 * self.idle(x)
            return self.head(features.mean((2, 3)))

    class TwoStreams(Idle):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.used(x) + 1e-18 * self.mix(self.idle(x).relu())).mean((2, 3)))

    assert tp_mrs.check_coupling(Idle(), torch.rand(1, 3, 4, 4)).proven
    report = tp_mrs.check_coupling(TwoStreams(), torch.rand(1, 3, 4, 4))
    assert [(check.group, check.fault) for check in report.faults] == [
        ("idle", "the output depends on it too little to tell")
    ]


def test_groups_of_one_unit_pass() -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 6, 1), nn.Flatten(), nn.Linear(6 * 16, 2))
    report = tp_mrs.check_coupling(model, torch.rand(1, 3, 4, 4))
    assert report.proven
    assert {check.group: check.units for check in report.checks} == {"2": 6}


@pytest.mark.parametrize("factor", [math.nan, 1e300])
def test_a_model_without_finite_outputs_proves_nothing(factor: float) -> None:
    model = small_cnn().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    with pytest.raises(tp_mrs.InputError, match="not finite"):
        tp_mrs.check_coupling(model, torch.rand(1, 3, 16, 16, dtype=torch.float64))


def test_outputs_of_any_form() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            logits = self.head(self.body(x).mean((2, 3)))
            return {"logits": logits, "others": [logits.sum(1), (logits + 1,)]}

    report = tp_mrs.check_coupling(Several(), torch.rand(1, 3, 4, 4))
    assert {check.group for check in report.checks} == {"body"}
    assert report.proven


def test_nothing_prunable_proves_nothing() -> None:
    report = tp_mrs.check_coupling(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2))
    assert report.checks == ()
    assert str(report) == "nothing of this model can be pruned"
    assert not report.proven
    assert math.isnan(coupling.GroupCheck("a", 1).swapped)


@pytest.mark.parametrize("images", [torch.rand(3, 4, 4), "image", None])
def test_bad_images(images: Any) -> None:
    with pytest.raises(tp_mrs.InputError, match="example_inputs"):
        tp_mrs.check_coupling(small_cnn(), images)
