"""measure_sensitivity: groups, what it accepts, and that the user's model comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchattacks
from torch import nn

from tests.conftest import Batches, image_batches, small_cnn, small_resnet, unchanged
from tp_mrs import InputError, Sensitivity, measure_sensitivity
from tp_mrs.sensitivity import measure

EXAMPLE = torch.rand(1, 3, 32, 32)


def test_groups_sum_every_coupled_layer(resnet: nn.Module, batches: Batches) -> None:
    result = measure_sensitivity(resnet, batches, torchattacks.FGSM, example_inputs=EXAMPLE)
    stem = {"conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"}
    stem |= {"layer2.0.conv1", "layer2.0.downsample.0"}  # the next stage reads the same channels
    name = next(name for name, layers in result.members.items() if "conv1" in layers)
    if name == "conv1":  # the narrow stage has a downsample, which ends the group
        stem = {"conv1", "layer1.0.conv1", "layer1.0.downsample.0"}
    assert set(result.members[name]) == stem
    for group, layers in result.members.items():
        assert result.groups[group] == pytest.approx(sum(result.modules[layer] for layer in layers))
        assert group in layers
        sizes = {layer: resnet.get_submodule(layer).weight.numel() for layer in layers}  # type: ignore[operator]
        assert result.typical[group] == pytest.approx(sum(result.modules[i] / sizes[i] ** 0.5 for i in layers))
    assert "fc" not in result.groups
    assert any("fc" in layers for layers in result.members.values())


def test_the_input_side_counts(cnn: nn.Module, batches: Batches) -> None:
    result = measure_sensitivity(cnn, batches, torchattacks.FGSM, example_inputs=EXAMPLE)
    assert result.members == {"0": ("0", "3"), "3": ("3", "7")}


@pytest.mark.parametrize(
    "attack",
    [torchattacks.VANILA, torchattacks.FGSM, torchattacks.PGD, torchattacks.TPGD, torchattacks.CW, torchattacks.PGDL2],
)
@pytest.mark.parametrize("estimator", ["first_order", "pga"])
def test_no_trace_in_the_model(attack: Any, estimator: Any, batches: Batches) -> None:
    model = small_cnn()
    copies = [(images.clone(), labels.clone()) for images, labels in batches]
    with unchanged(model):
        measure_sensitivity(model, batches, attack(model), example_inputs=EXAMPLE, estimator=estimator)
    for (images, labels), (images_before, labels_before) in zip(batches, copies, strict=True):
        assert torch.equal(images, images_before)
        assert torch.equal(labels, labels_before)


def test_no_trace_when_the_attack_fails(batches: Batches) -> None:
    class Fails(torchattacks.FGSM):
        def forward(self, images: Any, labels: Any) -> Any:
            super().forward(images, labels)
            raise RuntimeError("attack broke")

    model = small_cnn()
    with unchanged(model), pytest.raises(RuntimeError, match="attack broke"):
        measure_sensitivity(model, batches, Fails, example_inputs=EXAMPLE)


def test_frozen_layers_are_measured_all_the_same(batches: Batches) -> None:
    model = small_resnet()
    free = measure(model, batches, torchattacks.FGSM)
    model.requires_grad_(False)
    assert measure(model, batches, torchattacks.FGSM).modules == free.modules
    frozen = measure_sensitivity(model, batches, torchattacks.FGSM, example_inputs=EXAMPLE)
    assert frozen.modules == free.modules
    assert len(frozen.groups) == 13


def test_same_seed_same_scores(batches: Batches) -> None:
    model = small_cnn()
    first, again, other = (measure(model, batches, torchattacks.PGD, seed=seed).modules for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_unused_layers_score_zero(batches: Batches) -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.spare = small_cnn(), nn.Linear(3, 3)

        def forward(self, images: Any) -> Any:
            return self.net(images)

    assert measure(Spare(), batches, torchattacks.FGSM).modules["spare"] == 0


def test_max_batches_and_generators(batches: Batches) -> None:
    model = small_cnn()
    assert measure(model, (pair for pair in batches), torchattacks.FGSM, max_batches=1).images == 6
    assert measure(model, (pair for pair in batches), torchattacks.FGSM).images == 12


def test_works_on_mobilevit() -> None:
    model = timm.create_model("mobilevit_xxs", num_classes=4)
    data = image_batches(1, 2, 64)
    result = measure_sensitivity(model, data, torchattacks.FGSM, example_inputs=torch.rand(1, 3, 64, 64))
    assert len(result.groups) == 43
    assert all(score >= 0 for score in result.groups.values())


def test_saves_and_loads(cnn: nn.Module, batches: Batches, tmp_path: Path) -> None:
    result = measure_sensitivity(cnn, batches, torchattacks.FGSM, example_inputs=EXAMPLE)
    path = result.save(tmp_path / "s.json")
    assert Sensitivity.load(path) == result
    assert json.loads(path.read_text())["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_prints_as_a_table(cnn: nn.Module, batches: Batches) -> None:
    result = measure_sensitivity(cnn, batches, torchattacks.FGSM, example_inputs=EXAMPLE)
    lines = str(result).splitlines()
    assert "robust accuracy" in lines[0]
    assert len(lines) == 2 + len(result.groups)


def test_plots(cnn: nn.Module, batches: Batches) -> None:
    result = measure_sensitivity(cnn, batches, torchattacks.FGSM, example_inputs=EXAMPLE)
    assert len(result.plot().axes) == 2
    assert len(result.plot({"0": 0.5, "3": 0.25}).axes) == 3


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "tp_mrs.sensitivity/9"}', '{"format": 3}', "{" * 9000])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(InputError, match="path"):
        Sensitivity.load(path)


def test_incomplete_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text('{"format": "tp_mrs.sensitivity/1", "modules": {}}')
    with pytest.raises(InputError, match="lacks parts"):
        Sensitivity.load(path)


def image(value: float) -> Batches:
    return [(torch.full((2, 3, 32, 32), value), torch.zeros(2, dtype=torch.long))]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (image(1.5), r"images: expected values in \[0, 1\].*normalize"),
        (image(-0.1), r"images: expected values in \[0, 1\]"),
        (image(float("nan")), "images: found NaN"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0, 4]))], "labels: expected classes 0 to 3"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0, -1]))], "labels: expected classes"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0.0, 1.0]))], "labels: expected an integer tensor"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0]))], "labels: expected one label per image"),
        ([(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]))], "images: expected a floating-point"),
        ([(torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.long))], "labels: expected .* at least one image"),
        ([(torch.zeros(2, 1, 32, 32), torch.tensor([0, 1]))], "images: the model cannot run on shape"),
        ([], "data: it yielded no batch"),
        ([torch.zeros(2, 3, 32, 32)], "data: expected batches of"),
        (7, "data: expected an iterable"),
    ],
)
def test_bad_data(data: Any, message: str) -> None:
    model = small_cnn()
    with unchanged(model), pytest.raises(InputError, match=message):
        measure_sensitivity(model, data, torchattacks.FGSM, example_inputs=EXAMPLE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": -0.1}, "epsilon: expected a number >= 0"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"estimator": "second_order"}, "estimator: expected one of first_order, pga"),
        ({"steps": 0}, "steps: expected an integer >= 1"),
        ({"max_batches": 0}, "max_batches"),
        ({"example_inputs": torch.rand(3, 32, 32)}, "example_inputs: expected a tensor of shape"),
        ({"example_inputs": torch.rand(1, 5, 32, 32)}, "example_inputs: the model cannot run"),
        (
            {"example_inputs": torch.rand(1, 3, 32, 32, device="meta")},
            "example_inputs: on meta, but the model is on cpu",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, batches: Batches) -> None:
    model = small_cnn()
    with unchanged(model), pytest.raises(InputError, match=message):
        measure_sensitivity(model, batches, torchattacks.FGSM, **{"example_inputs": EXAMPLE, **arguments})


def test_an_attack_on_another_model(batches: Batches) -> None:
    model, other = small_cnn(), small_cnn()
    with unchanged(model), pytest.raises(InputError, match=r"attack: this FGSM is bound to another model.*factory"):
        measure_sensitivity(model, batches, torchattacks.FGSM(other), example_inputs=EXAMPLE)


@pytest.mark.parametrize("attack", [None, "pgd", lambda model: None, lambda model: lambda images, labels: images])
def test_no_attack(attack: Any, batches: Batches) -> None:
    with pytest.raises(InputError, match="attack: expected a torchattacks attack or a factory"):
        measure_sensitivity(small_cnn(), batches, attack, example_inputs=EXAMPLE)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "model: it has no parameters"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()), "model: it has no convolutional or linear layer"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), "model: it has no prunable layers"),
        (small_cnn().to("meta"), "model: its parameters are on the meta device"),
        ("resnet18", "model: expected a torch.nn.Module"),
    ],
)
def test_models_that_cannot_be_measured(model: Any, message: str, batches: Batches) -> None:
    with pytest.raises(InputError, match=message):
        measure_sensitivity(model, batches, torchattacks.FGSM, example_inputs=EXAMPLE)


def test_an_attack_that_expects_normalised_images(batches: Batches) -> None:
    model = small_cnn()
    attack = torchattacks.FGSM(model)
    attack.set_normalization_used([0.5] * 3, [0.5] * 3)
    with pytest.raises(InputError, match=r"tp_mrs\.normalize"):
        measure_sensitivity(model, batches, attack, example_inputs=EXAMPLE)
