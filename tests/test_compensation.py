"""compensated_step: layers make up for channels that go, as well as linear regression can, and exactly where it can."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
import torchattacks
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import ScaledStdConv2d
from torch import Tensor, nn

import tp_mrs
from tests.conftest import Batches, image_batches, small_cnn, small_resnet
from tp_mrs import DivergenceError, InputError, compensated_step
from tp_mrs.compensation import RIDGES, WIDEST, Moments, _errors, _prediction, make_up, recording
from tp_mrs.pruning import build_pruner


def moments_of(rows: Tensor) -> Tensor:
    """By definition: Σ x xᵀ of each half, with a 1 behind x."""
    whole = torch.cat([rows.double(), torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    return torch.stack([sum(row.outer(row) for row in half) for half in whole.tensor_split(2)])


def without_last(layer: Any, moments: Tensor, *, count: int = 1, norm: Any = None) -> Any:
    """A layer that has lost its last inputs, and made up for them."""
    channels = layer.weight.shape[1]
    kept = copy.deepcopy(layer)
    kept.weight = nn.Parameter(layer.weight[:, :-count].detach().clone())
    make_up(kept, layer.weight[:, -count:].detach(), moments, torch.arange(channels) >= channels - count, norm)
    return kept


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return layer


class Chosen(tp.importance.Importance):
    """Scores 0 for some channels of each group, 1 for the others."""

    def __init__(self, *channels: int) -> None:
        self.channels = list(channels)

    def __call__(self, group: Any) -> Tensor:
        scores = torch.ones(len(group[0].idxs))
        scores[self.channels] = 0
        return scores


def recorded(model: nn.Module, images: Tensor) -> Moments:
    with torch.no_grad(), recording(model.eval()) as found:
        model(images)
    return found


# --- one layer -------------------------------------------------------------------------------------------------------


def test_recorded_by_definition() -> None:
    model, images = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)), torch.rand(4, 2, 4, 4)
    found = recorded(model, images)
    torch.testing.assert_close(found["0"], moments_of(images.permute(0, 2, 3, 1).reshape(-1, 2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["2"], moments_of(model[:2](images).detach()), rtol=1e-5, atol=1e-5)


def test_linear_by_hand() -> None:
    # the second input is twice the first plus 1: w₁ + 2 w₂, and w₂ more bias
    first = torch.linspace(-1, 1, 8)
    layer = linear([[1.0, 3.0], [0.0, -1.0]], [0.5, 0.0])
    layer = without_last(layer, moments_of(torch.stack([first, 2 * first + 1], dim=1)))
    torch.testing.assert_close(layer.weight[:, 0], torch.tensor([7.0, -2.0]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.bias, torch.tensor([3.5, -1.0]), rtol=1e-3, atol=1e-3)


def test_without_bias_by_hand() -> None:
    # of x₁ = 1, 2, 1, 2 and x₂ = x₁ + 1 the best multiple is Σ x₁x₂ / Σ x₁² = 16 / 10
    first = torch.tensor([1.0, 2.0, 1.0, 2.0])
    rows = moments_of(torch.stack([first, first + 1], dim=1))
    layer = without_last(linear([[0.0, 1.0]]), rows)
    torch.testing.assert_close(layer.weight[0, 0].item(), 1.6, rtol=1e-3, atol=0)


def test_the_norm_behind_takes_the_constant() -> None:
    first = torch.linspace(-1, 1, 8)
    rows, norm = moments_of(torch.stack([first, first + 5], dim=1)), nn.BatchNorm1d(1)
    layer = without_last(linear([[0.0, 2.0]]), rows, norm=norm)
    torch.testing.assert_close(layer.weight[0, 0].item(), 2.0, rtol=1e-3, atol=0)
    torch.testing.assert_close(norm.running_mean, torch.tensor([-10.0]), rtol=1e-3, atol=0)


def test_a_channel_like_no_other_leaves_its_mean() -> None:
    rows = torch.tensor([[-1.0, 2.0], [1.0, 2.0], [-1.0, 4.0], [1.0, 4.0]]).repeat(2, 1)  # uncorrelated in each half
    layer = without_last(linear([[1.0, 3.0]], [0.0]), moments_of(rows))
    assert layer.weight[0, 0].item() == pytest.approx(1.0)
    assert layer.bias.item() == pytest.approx(9.0)


def test_convolution_exact_where_channels_depend() -> None:
    torch.manual_seed(0)
    images = torch.rand(6, 2, 5, 5)
    images = torch.cat([images, (0.5 * images[:, :1] - 2 * images[:, 1:] + 0.25)], dim=1)
    layer = nn.Conv2d(3, 4, 3)
    model = nn.Sequential(layer)
    before, moments = layer(images), recorded(model, images)["0"]
    after = without_last(layer, moments)(images[:, :2])
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)  # but for the ridge


@pytest.mark.parametrize("bias", [True, False])
def test_each_group_of_a_convolution_makes_up_by_itself(bias: bool) -> None:
    torch.manual_seed(0)
    images = torch.rand(8, 6, 5, 5)
    images[:, 2] += images[:, 0]
    images[:, 5] -= images[:, 4]
    layer, norm, lost = nn.Conv2d(6, 4, 3, groups=2, bias=bias), nn.BatchNorm2d(4), torch.tensor([False, False, True])
    whole: Any = copy.deepcopy(layer)
    whole.weight = nn.Parameter(layer.weight[:, :2].detach().clone())
    read = layer.weight[:, 2:].detach()
    make_up(whole, read, recorded(nn.Sequential(layer), images)["0"], lost, None if bias else norm)
    for part in (0, 1):
        rows, channels = slice(2 * part, 2 * part + 2), slice(3 * part, 3 * part + 3)
        alone: Any = nn.Conv2d(3, 2, 3, bias=bias)
        alone.weight.data = layer.weight[rows].detach().clone()
        if layer.bias is not None:
            alone.bias.data = layer.bias[rows].detach().clone()
        moments, behind = recorded(nn.Sequential(alone), images[:, channels])["0"], nn.BatchNorm2d(2)
        alone = without_last(alone, moments, norm=None if bias else behind)
        torch.testing.assert_close(whole.weight[rows], alone.weight)
        constants = (whole.bias[rows], alone.bias) if bias else (norm.running_mean[rows], behind.running_mean)  # type: ignore[index]
        torch.testing.assert_close(*constants)
        assert not torch.allclose(whole.weight[rows], layer.weight[rows, :2])


def test_a_mean_that_dwarfs_the_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(64, 1, generator=generator)
    images = 1000 + torch.cat([first, torch.rand(64, 1, generator=generator), first], dim=1)
    layer = linear([[0.0, 0.0, 1.0]], [0.0])
    layer = without_last(layer, recorded(nn.Sequential(layer), images)["0"])
    torch.testing.assert_close(layer.weight[0], torch.tensor([1.0, 0.0]), rtol=1e-2, atol=1e-2)


@given(
    seed=st.integers(0, 2**16),
    stay=st.integers(1, 5),
    go=st.integers(1, 3),
    ridge=st.sampled_from(RIDGES[:-1]),
    constant=st.booleans(),
)
def test_prediction_is_ridge_regression(seed: int, stay: int, go: int, ridge: float, constant: bool) -> None:
    """Against least squares on the rows themselves, with a row more for each channel's penalty."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(30, stay + go)) @ generator.normal(size=(stay + go, stay + go)) + 3
    inputs, targets = rows[:, :stay], rows[:, stay:]
    means = rows.mean(axis=0) if constant else np.zeros(stay + go)
    variance = np.mean((inputs - means[:stay]) ** 2)
    penalty = np.sqrt(ridge * variance * len(rows)) * np.eye(stay)
    left = np.concatenate([inputs - means[:stay], penalty])
    right = np.concatenate([targets - means[stay:], np.zeros((stay, go))])
    expected = np.linalg.lstsq(left, right, rcond=None)[0]
    whole = moments_of(torch.from_numpy(rows)).sum(dim=0)
    coefficients, shift = _prediction(whole, torch.arange(stay + go) >= stay, ridge, constant)
    np.testing.assert_allclose(coefficients, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(shift, means[stay:] - means[:stay] @ expected, rtol=1e-5, atol=1e-7)


@given(seed=st.integers(0, 2**16), stay=st.integers(1, 5), go=st.integers(1, 3), constant=st.booleans())
def test_errors_are_those_on_the_rows_of_the_other_half(seed: int, stay: int, go: int, constant: bool) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(40, stay + go)) @ generator.normal(size=(stay + go, stay + go)) + 3
    read, lost = generator.normal(size=(4, go)), torch.arange(stay + go) >= stay
    one, other = moments_of(torch.from_numpy(rows))
    unseen = rows[20:]
    expected = []
    for ridge in RIDGES:
        coefficients, shift = (part.numpy() for part in _prediction(one, lost, ridge, constant))
        missed = (unseen[:, stay:] - unseen[:, :stay] @ coefficients - shift) @ read.T
        expected.append(np.mean(np.sum(missed**2, axis=1)))
    found = _errors(one, other, lost, torch.from_numpy(read.T @ read), constant)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_nothing_is_read_into_noise() -> None:
    """With fewer images than channels, any regression fits them; the half that it hasn't seen tells."""
    generator = torch.Generator().manual_seed(0)
    seen, fresh = torch.randn(60, 120, generator=generator), torch.randn(2000, 120, generator=generator)
    layer = nn.Linear(120, 8)
    whole, plain = layer(fresh), nn.functional.linear(fresh[:, :100], layer.weight[:, :100], layer.bias)
    made_up = without_last(layer, moments_of(seen), count=20)(fresh[:, :100])
    assert (made_up - whole).square().mean() < 1.2 * (plain - whole).square().mean()


def test_an_empty_half_changes_nothing() -> None:
    moments = torch.zeros(2, 3, 3, dtype=torch.float64)
    moments[0] = torch.ones(3, 3)  # a single row
    layer = without_last(linear([[1.0, 3.0]], [0.5]), moments)
    assert (layer.weight.tolist(), layer.bias.tolist()) == ([[1.0]], [0.5])


@pytest.mark.parametrize("constant", [True, False])
def test_dead_channels(constant: bool) -> None:
    layer = without_last(linear([[1.0, 3.0]], [0.0] if constant else None), moments_of(torch.zeros(4, 2)))
    assert layer.weight.tolist() == [[1.0]]


# --- a network -------------------------------------------------------------------------------------------------------


def twins(model: nn.Module, layer: Any, norm: Any) -> nn.Module:
    """Give the layer's third channel the weights of its second."""
    for tensor in (layer.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, layer.bias):
        if tensor is not None:
            tensor.data[2] = tensor.data[1]
    return model.eval()


def cnn_with_twins() -> nn.Module:
    model: Any = small_cnn()
    return twins(model, model[0], model[1])


def resnet_with_twins() -> nn.Module:
    model: Any = small_resnet()
    return twins(model, model.layer2[0].conv1, model.layer2[0].bn1)


def grouped_with_twins() -> nn.Module:
    """Of 8 channels 2 is like 0, and 6, in the other group of the second layer, like 4."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[[2, 6]] = parameter[[0, 4]]
        model[2].weight *= 10
    return model.eval()


@pytest.mark.parametrize(
    ("make", "root", "gone"),
    [(cnn_with_twins, "0", (2,)), (resnet_with_twins, "layer2.0.conv1", (2,)), (grouped_with_twins, "0", (2, 6))],
    ids=["cnn", "resnet", "groups"],
)
def test_of_two_twins_one_can_go(
    make: Callable[[], nn.Module], root: str, gone: tuple[int, ...], batches: Batches
) -> None:
    images, outputs = batches[0][0], dict[bool, float]()
    for compensated in (True, False):
        model = make()
        before = model(images)
        layer: Any = model.get_submodule(root)
        ratios = {layer: len(gone) / len(layer.weight)}
        pruner = build_pruner(model, images[:1], Chosen(*gone), pruning_ratio=0.0, pruning_ratio_dict=ratios)
        if compensated:
            compensated_step(pruner, batches, torchattacks.VANILA, progress=False)
        else:
            pruner.step()
        outputs[compensated] = float((model(images) - before).detach().norm() / before.detach().norm())
    assert outputs[True] < 1e-3 < 1e-2 < outputs[False]


def both_ways(dense: nn.Module, batches: Batches, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A compensated copy, and one that is only pruned."""
    images, models = batches[0][0], (copy.deepcopy(dense), copy.deepcopy(dense))
    pruners = [build_pruner(model, images[:1], pruning_ratio=0.5, **options) for model in models]
    compensated_step(pruners[0], batches, torchattacks.FGSM, progress=False)
    pruners[1].step()
    return tp_mrs.refresh(models[0]), tp_mrs.refresh(models[1])


@pytest.mark.parametrize("options", [{}, {"global_pruning": True}, {"global_pruning": True, "isomorphic": True}])
def test_the_same_channels_go(options: dict[str, Any], batches: Batches) -> None:
    compensated, pruned = both_ways(small_resnet(), batches, **options)
    norms = [[m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)] for model in (compensated, pruned)]
    assert all(torch.equal(one, other) for one, other in zip(*norms, strict=True))


@pytest.mark.parametrize("architecture", ["resnet18", "regnetx_002", "mobilevit_xxs", "vit_tiny_patch16_224"])
def test_layers_that_lose_inputs_change_and_no_others(architecture: str) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2}}
    dense: Any = tp_mrs.create_model(architecture, num_classes=4, **small.get(architecture, {}))
    compensated, pruned = both_ways(dense, image_batches(1, 32))
    assert compensated.eval()(image_batches()[0][0]).isfinite().all()
    losers, changed = set(), set()
    for name, layer in pruned.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            own: Any = compensated.get_submodule(name)
            if layer.weight.shape[1] < dense.get_submodule(name).weight.shape[1]:
                losers.add(name)
            if not torch.equal(own.weight, layer.weight):
                changed.add(name)
    assert changed <= losers
    assert len(changed) > len(losers) / 2  # in the others, one half of the images says nothing of the other


def test_step_after_step() -> None:
    model = tp_mrs.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32, patch_size=8, depth=2)
    data = image_batches(1, 8)
    pruner = build_pruner(model, data[0][0][:1], pruning_ratio=0.5, iterative_steps=2)
    for _ in range(2):
        compensated_step(pruner, data, torchattacks.FGSM, progress=False)
    assert tp_mrs.refresh(model).eval()(data[0][0]).isfinite().all()
    assert model.get_submodule("blocks.0.mlp.fc2").weight.shape[1] == 384  # type: ignore[index]


def test_frozen_layers_stay(batches: Batches) -> None:
    model: Any = cnn_with_twins()
    model[3].weight.requires_grad_(False)
    expected = model[3].weight[:, [0, 1, 3, 4, 5, 6, 7]].clone()
    pruner = build_pruner(model, batches[0][0][:1], Chosen(2), pruning_ratio=0.0, pruning_ratio_dict={model[0]: 1 / 8})
    compensated_step(pruner, batches, torchattacks.VANILA, progress=False)
    assert torch.equal(model[3].weight, expected)


@pytest.mark.parametrize(("bias", "frozen"), [(True, "2.bias"), (False, "3.weight")])
def test_what_is_frozen_takes_no_constant(bias: bool, frozen: str, batches: Batches) -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=bias), nn.BatchNorm2d(4)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    model.get_parameter(frozen).requires_grad_(False)
    constants = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if name in ("2.bias", "3.running_mean")
    }
    pruner = build_pruner(model, batches[0][0][:1], Chosen(2), pruning_ratio=0.0, pruning_ratio_dict={model[0]: 1 / 8})
    compensated_step(pruner, batches, torchattacks.VANILA, progress=False)
    assert all(torch.equal(model.state_dict()[name], constant) for name, constant in constants.items())


def test_what_is_frozen_stays_so_step_after_step(batches: Batches) -> None:
    """The classifier alone may change; Torch-Pruning thaws what it prunes."""
    model: Any = small_resnet()
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_()
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    pruner = build_pruner(model, batches[0][0][:1], pruning_ratio=0.5, iterative_steps=2)
    for _ in range(2):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("fc")}
        compensated_step(pruner, batches, torchattacks.VANILA, progress=False)
        assert all(torch.isin(model.state_dict()[name], tensor).all() for name, tensor in before.items())
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert free == {"fc.weight", "fc.bias"}
    assert model.fc.weight.shape[1] < 20


def test_batches_of_one_row_are_halved_too(batches: Batches) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    images = torch.rand(6, 3, 2, 2)
    with torch.no_grad(), recording(model.eval()) as found:
        for image in images:
            model(image[None])
    torch.testing.assert_close(found["1"], torch.stack([_of(images[0::2]), _of(images[1::2])]))


def _of(images: Tensor) -> Tensor:
    rows = torch.cat([images.flatten(1), torch.ones(len(images), 1)], dim=1).double()
    return rows.T @ rows


def test_nothing_to_change_is_told(batches: Batches, caplog: pytest.LogCaptureFixture) -> None:
    model = small_cnn().requires_grad_(False)
    pruner = build_pruner(model, batches[0][0][:1], pruning_ratio=0.5)
    compensated_step(pruner, batches, torchattacks.VANILA, progress=False)
    assert "no layer made up for channels" in caplog.text


def test_infinite_activations_prune_nothing(batches: Batches) -> None:
    model: Any = small_cnn()
    model[0].weight.data *= 1e38
    model[1].weight.data *= 1e10
    pruner = build_pruner(model, batches[0][0][:1], pruning_ratio=0.5)
    with pytest.raises(DivergenceError, match="what layers read of the attacked images is not finite"):
        compensated_step(pruner, batches, torchattacks.VANILA, progress=False)
    assert len(model[0].weight) == 8


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(input=self.first(images).mean(dim=(2, 3)))


def test_layers_called_by_keyword_are_told_and_no_hook_stays(batches: Batches) -> None:
    model = ByKeyword()
    with pytest.raises(InputError, match="model: it calls a Linear by keyword"):
        build_pruner(model, batches[0][0][:1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    pruner = tp.pruner.BasePruner(model, batches[0][0][:1], tp.importance.MagnitudeImportance(), pruning_ratio=0.5)
    with pytest.raises(InputError, match="model: it calls a Linear by keyword"):
        compensated_step(pruner, batches, torchattacks.VANILA, progress=False)
    assert len(model.first.weight) == 8


def test_layers_that_read_in_another_way_are_not_recorded() -> None:
    shared = nn.Conv2d(4, 4, 1)
    twin = nn.Conv2d(4, 4, 1)
    twin.weight = shared.weight
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        ScaledStdConv2d(4, 4, 1),
        nn.ConvTranspose2d(4, 4, 1),
        shared,
        twin,
        nn.Conv2d(4, 2, 1),
    )
    assert set(recorded(model, torch.rand(2, 4, 4, 4))) == {"5"}
    assert not recorded(nn.Sequential(nn.Linear(WIDEST + 1, 2)), torch.rand(2, WIDEST + 1))


# --- the user's model ------------------------------------------------------------------------------------------------


def test_all_but_weights_is_left_as_it_was(batches: Batches) -> None:
    model = small_resnet()
    pruner = build_pruner(model, batches[0][0][:1], pruning_ratio=0.5)
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 0
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    compensated_step(pruner, batches, lambda model: torchattacks.PGD(model, steps=2), progress=False)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruner": None}, "pruner: expected a pruner of Torch-Pruning"),
        ({"data": []}, "data: it yielded no batch"),
        ({"data": [(torch.full((2, 3, 32, 32), 2.0), torch.tensor([0, 1]))]}, "images"),
        ({"attack": "pgd"}, "attack"),
        ({"max_batches": 0}, "max_batches"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_input_prunes_nothing(changes: dict[str, Any], message: str, batches: Batches) -> None:
    model = small_resnet()
    before = copy.deepcopy(model.state_dict())
    pruner = build_pruner(model, batches[0][0][:1], pruning_ratio=0.5)
    arguments = {"pruner": pruner, "data": batches, "attack": torchattacks.FGSM, "progress": False} | changes
    with pytest.raises(InputError, match=message):
        compensated_step(**arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
