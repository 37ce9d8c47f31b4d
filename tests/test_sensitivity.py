"""measure_sensitivity: groups, what it accepts, and that the user's model comes back as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchattacks
from torch import nn

from tests.conftest import Batches, image_batches, small_cnn, small_resnet, unchanged
from tp_mrs import InputError, Sensitivity, measure_sensitivity
from tp_mrs.measuring import measure

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
        assert result.typical[group] == pytest.approx(sum(result.modules[i] ** 2 / sizes[i] for i in layers) ** 0.5)
    assert "fc" not in result.groups
    assert any("fc" in layers for layers in result.members.values())


def test_groups_together(cnn: nn.Module, batches: Batches) -> None:
    options: dict[str, Any] = {"example_inputs": EXAMPLE, "estimator": "pga", "steps": 6}
    with unchanged(cnn):
        result = measure_sensitivity(cnn, batches, torchattacks.FGSM, together=True, **options)
    assert set(result.together) == set(result.members)
    for group, layers in result.members.items():  # more freedom than any layer alone
        assert result.together[group] > max(result.modules[layer] for layer in layers)
    assert measure_sensitivity(cnn, batches, torchattacks.FGSM, **options).together == {}


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

    model = Spare()
    nn.init.constant_(model.spare.weight, math.nan)
    for estimator in ("first_order", "pga"):
        assert measure(model, batches, torchattacks.FGSM, estimator=estimator).modules["spare"] == 0


def test_a_weight_that_goes_by_another_name(batches: Batches) -> None:
    model: Any = small_cnn()
    model.first = model[0].weight  # shared, and named first
    model._parameters = {"first": model[0].weight}
    plain = measure(small_cnn(), batches, torchattacks.VANILA, estimator="pga")
    assert set(plain.modules) == {"0", "3", "7"}
    assert measure(model, batches, torchattacks.VANILA, estimator="pga").modules["0"] > 0


def test_memory_and_strides_stay(batches: Batches) -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model.register_buffer("grid", torch.zeros(1, 3, 4, 4))
    model.register_buffer("cube", torch.zeros(1, 3, 4, 4, 4))
    tensors = [*model.parameters(), *model.buffers()]
    before = [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]
    measure(model, batches, torchattacks.VANILA, channels_last=True)
    assert all(one is other for one, other in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    assert [(tensor.data_ptr(), tensor.stride()) for tensor in tensors] == before


@pytest.mark.parametrize("estimator", ["first_order", "pga"])
def test_channels_last_and_bf16_change_little(estimator: Any, batches: Batches) -> None:
    model: Any = small_cnn()
    plain = measure(model, batches, torchattacks.VANILA, estimator=estimator).modules
    with unchanged(model):
        other = measure(model, batches, torchattacks.VANILA, estimator=estimator, channels_last=True).modules
        rough = measure(model, batches, torchattacks.VANILA, estimator=estimator, precision="bf16").modules
    assert model[3].weight.is_contiguous()
    model.to(memory_format=torch.channels_last)
    measure(model, batches, torchattacks.VANILA, channels_last=True)
    assert not model[3].weight.is_contiguous()
    assert other == pytest.approx(plain, rel=1e-3)
    assert rough == pytest.approx(plain, rel=0.2)
    assert rough != plain


def test_the_order_of_batches_changes_nothing(batches: Batches) -> None:
    model = small_cnn()
    forward = measure(model, batches, torchattacks.VANILA).modules
    assert measure(model, batches[::-1], torchattacks.VANILA).modules == pytest.approx(forward, rel=1e-5)


def test_max_batches_and_generators(batches: Batches) -> None:
    model = small_cnn()
    assert measure(model, (pair for pair in batches), torchattacks.FGSM, max_batches=1).blocks == (6,)
    assert measure(model, (pair for pair in batches), torchattacks.FGSM).blocks == (12,)


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
    assert len(lines) == 3 + len(result.groups)
    assert lines[-1] == "Too few images to say how stable this is; use at least 128."


def test_plots(cnn: nn.Module, batches: Batches) -> None:
    result = measure_sensitivity(cnn, batches, torchattacks.FGSM, example_inputs=EXAMPLE)
    assert len(result.plot().axes) == 2
    assert len(result.plot({"0": 0.5, "3": 0.25}).axes) == 3


# --- uncertainty ---------------------------------------------------------------------------------------------------


def made_up(shares: dict[str, list[float]], sizes: dict[str, int] | None = None) -> Sensitivity:
    """A sensitivity of these blocks of 10 images; one group for each layer."""
    return Sensitivity(
        modules={name: sum(values) for name, values in shares.items()},
        members={name: (name,) for name in shares},
        sizes=sizes or dict.fromkeys(shares, 1),
        robust_loss=1.0,
        robust_accuracy=0.5,
        blocks=(10,) * len(next(iter(shares.values()))),
        shares={name: tuple(values) for name, values in shares.items()},
        units=dict.fromkeys(shares, (1.0,)),
    )


def test_intervals_of_blocks_that_agree_are_points() -> None:
    result = made_up({"a": [0.1] * 10, "b": [0.3] * 10}, {"a": 4, "b": 9})
    assert result.intervals("modules") == {"a": pytest.approx((1.0, 1.0)), "b": pytest.approx((3.0, 3.0))}
    assert result.intervals("typical") == {"a": pytest.approx((0.5, 0.5)), "b": pytest.approx((1.0, 1.0))}
    assert result.rank_stability() == 1.0
    assert result.images_for_stable_ranking() == 100
    assert "stable" not in str(result)


def test_intervals_are_as_wide_as_the_blocks_say() -> None:
    shares = np.random.default_rng(0).normal(0.05, 0.02, 20).tolist()
    result = made_up({"a": shares})
    low, high = result.intervals("modules")["a"]
    spread = 1.96 * np.std(shares) * math.sqrt(20)  # of a sum of twenty
    assert low == pytest.approx(sum(shares) - spread, abs=0.15 * spread)
    assert high == pytest.approx(sum(shares) + spread, abs=0.15 * spread)
    narrow = result.intervals("modules", level=0.5)["a"]
    assert low < narrow[0] < sum(shares) < narrow[1] < high


def test_intervals_cover_what_they_should() -> None:
    """Of 95% intervals for the mean of 16 blocks, about 95% hold the truth (a little fewer: 16 blocks are few)."""
    generator, held = np.random.default_rng(1), 0
    for _ in range(100):
        shares = (generator.gamma(2.0, 0.5, 16) / 16).tolist()
        low, high = made_up({"a": shares}).intervals("modules")["a"]
        held += low <= 1.0 <= high
    assert 82 <= held <= 100


def test_layers_that_change_places_are_not_stable() -> None:
    noise = np.random.default_rng(0).normal(0.0, 1.0, (12, 5))
    shares = {str(index): (column + 1 + 0.1 * index).tolist() for index, column in enumerate(noise.T)}
    result = made_up(shares)
    assert result.rank_stability() < 0.9
    assert result.rank_stability(times=16) > result.rank_stability(times=4) > result.rank_stability()
    enough = result.images_for_stable_ranking()
    assert enough is None or (enough > result.images and result.rank_stability(times=enough // result.images) >= 0.95)
    assert str(result).splitlines()[-1].startswith("The ranking is not stable yet (rank correlation 0.")


def test_the_table_tells_how_many_images_would_settle_the_ranking() -> None:
    noise = np.random.default_rng(3).normal(0.0, 0.5, (12, 6))
    result = made_up({str(index): (column + index * 0.1 + 1).tolist() for index, column in enumerate(noise.T)})
    enough = result.images_for_stable_ranking()
    assert enough is not None
    assert enough > result.images
    assert f"about {enough} images would settle it" in str(result)


def test_plots_show_intervals() -> None:
    result = made_up({"a": [0.1, 0.2] * 5, "b": [0.3, 0.1] * 5})
    figure = result.plot({"a": 0.5})
    assert [len(axis.containers) for axis in figure.axes] == [2, 2, 1]  # bars, and whiskers where there are intervals


def test_too_few_images_for_intervals(cnn: nn.Module, batches: Batches) -> None:
    result = measure_sensitivity(cnn, batches, torchattacks.FGSM, example_inputs=EXAMPLE)
    with pytest.raises(InputError, match=r"data: 12 calibration images are too few .* use at least 128"):
        result.intervals()
    with pytest.raises(InputError, match="too few"):
        result.rank_stability()
    with pytest.raises(InputError, match="times: expected an integer >= 1"):
        made_up({"a": [0.1] * 10}).rank_stability(times=0)


@pytest.mark.parametrize(("of", "level", "message"), [("layers", 0.9, "of: expected one of"), ("groups", 2, "level")])
def test_bad_arguments_of_intervals(of: Any, level: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        made_up({"a": [0.1] * 10}).intervals(of, level=level)


def test_measured_intervals_hold_what_other_images_give(cnn: nn.Module) -> None:
    def sample(seed: int, count: int) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        return [(torch.rand(count, 3, 12, 12, generator=generator), torch.arange(count) % 4)]

    truth = measure(cnn, sample(99, 4096), torchattacks.VANILA).modules
    found = measure_sensitivity(cnn, sample(0, 256), torchattacks.VANILA, example_inputs=torch.rand(1, 3, 12, 12))
    for name, (low, high) in found.intervals("modules", level=0.99).items():
        assert low * 0.9 < truth[name] < high * 1.1


def test_ratios_of_modules_cannot_be_plotted() -> None:
    with pytest.raises(InputError, match="ratios: expected names of groups, got 'Conv2d"):
        made_up({"a": [0.1] * 10}).plot({nn.Conv2d(1, 1, 1): 0.5})  # type: ignore[dict-item]


# --- shared weights ------------------------------------------------------------------------------------------------


def test_shared_weights_are_measured_once(batches: Batches) -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.Conv2d(6, 6, 1),
        nn.Conv2d(6, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    model[2].weight = model[1].weight
    found = measure(model, batches, torchattacks.VANILA)
    assert set(found.modules) == {"0", "1", "5"}
    assert found.aliases == {"2": "1"}
    assert measure(model, batches, torchattacks.VANILA, estimator="pga").modules["1"] > 0
    assert found.typical(["1", "2"]) == found.typical(["2"]) == found.typical(["1"])


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "tp_mrs.sensitivity/9"}', '{"format": 3}', "{" * 9000])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(InputError, match="path"):
        Sensitivity.load(path)


def test_incomplete_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text('{"format": "tp_mrs.sensitivity/4", "modules": {}}')
    with pytest.raises(InputError, match="lacks parts"):
        Sensitivity.load(path)


def image(value: float) -> Batches:
    return [(torch.full((2, 3, 32, 32), value), torch.zeros(2, dtype=torch.long))]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (image(1.5), r"images: expected values in \[0, 1\].*normalize"),
        (image(-0.1), r"images: expected values in \[0, 1\]"),
        (image(float("nan")), r"images: found NaN or infinity; expected finite values in \[0, 1\]$"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0, 4]))], "labels: expected classes 0 to 3"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0, -1]))], "labels: expected classes"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0.0, 1.0]))], "labels: expected an integer tensor"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0]))], "labels: expected one label per image"),
        ([(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]))], "images: expected a floating-point"),
        ([(torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.long))], "labels: expected .* at least one image"),
        ([(torch.zeros(2, 1, 32, 32), torch.tensor([0, 1]))], "images: the model cannot run on shape"),
        (
            [(torch.zeros(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1]))],
            r"images are torch.float64, weights torch.float32: make both float32 with .float\(\)",
        ),
        ([*image(0.5), *image(0.5), *image(2.0)], r"images: expected values in \[0, 1\].* \(batch 2\)$"),
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
        ({"epsilon": -0.1}, "epsilon: expected a number > 0"),
        ({"epsilon": 0.0}, "epsilon: expected a number > 0, got 0"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"estimator": "second_order"}, "estimator: expected one of first_order, pga"),
        ({"steps": 0}, "steps: expected an integer >= 1"),
        ({"max_batches": 0}, "max_batches"),
        ({"precision": "fp16"}, "precision: expected one of fp32, bf16, got 'fp16'"),
        ({"seed": -1}, "seed: expected an integer from 0"),
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
        (small_cnn().half(), r"model: expected weights of torch.float32, 0 has torch.float16.*model.float\(\)"),
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


def test_a_sensitivity_of_the_first_release() -> None:
    """Written by 0.1.0 and kept as it is: later versions read it."""
    found = Sensitivity.load(Path(__file__).parent / "files" / "sensitivity-0.1.0.json")
    assert found.groups["layer4.0.downsample.1"] == pytest.approx(0.006600348)
    assert found.units["layer4.0.downsample.1"][0] == pytest.approx(0.1551989)
    assert found.images == 32
