"""create_model and normalize."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn

from tests.conftest import small_cnn
from tp_mrs import InputError, create_model, normalize, pruner_kwargs


def test_normalises_inside_and_keeps_names() -> None:
    model = small_cnn().eval()
    plain = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    keys = list(model.state_dict())
    images = torch.rand(2, 3, 16, 16)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    assert normalize(model, mean, std) is model
    expected = plain((images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1))
    torch.testing.assert_close(model(images), expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys


def test_calling_again_replaces_the_statistics() -> None:
    model, images = small_cnn().eval(), torch.rand(1, 3, 16, 16)
    once = normalize(copy.deepcopy(model), [0.2] * 3, [0.3] * 3)
    twice = normalize(normalize(model, [0.9] * 3, [0.9] * 3), [0.2] * 3, [0.3] * 3)
    assert torch.equal(once(images), twice(images))


def test_a_copy_is_independent() -> None:
    model = normalize(small_cnn(), [0.2] * 3, [0.3] * 3).eval()
    other = normalize(copy.deepcopy(model), [0.5] * 3, [0.5] * 3)
    images = torch.rand(1, 3, 16, 16)
    assert not torch.equal(model(images), other(images))


@pytest.mark.parametrize(("name", "side"), [("resnet18", 32), ("vgg11_bn", 32), ("mobilevit_xxs", 64)])
def test_a_normalised_model_prunes_as_the_plain_one(name: str, side: int) -> None:
    plain = create_model(name, num_classes=4, image_size=side).eval()
    model = normalize(copy.deepcopy(plain), [0.0] * 3, [1.0] * 3)
    example = torch.rand(1, 3, side, side)
    for network in (plain, model):
        tp.pruner.BasePruner(
            network, example, importance=tp.importance.MagnitudeImportance(), **pruner_kwargs(network)
        ).step()
    assert [(n, p.shape) for n, p in plain.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]


@pytest.mark.parametrize(
    ("mean", "message"), [([0.5] * 2, "the model takes 3 channels, got 2"), ([123.0] * 3, "mean: .* divide by 255")]
)
def test_statistics_that_do_not_fit(mean: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        normalize(small_cnn(), mean, [0.5] * len(mean))


def test_normalisation_moves_with_the_model() -> None:
    model = normalize(small_cnn(), [0.2] * 3, [0.3] * 3).to(torch.float64)
    assert model(torch.rand(1, 3, 16, 16, dtype=torch.float64)).dtype == torch.float64


def test_grey_images_do_not_pass_for_coloured_ones() -> None:
    grey = torch.rand(1, 1, 8, 8)
    assert normalize(small_cnn(), [0.5], [0.5])(torch.rand(1, 3, 8, 8)).shape == (1, 4)
    with pytest.raises(InputError, match="images: expected 3 channels, as normalised by the model, got 1"):
        normalize(small_cnn(), [0.5] * 3, [0.5] * 3)(grey)


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.5, 0.5]), ([], []), ([0.5], [0.0]), ([0.5], [-1.0])])
def test_bad_statistics(mean: list[float], std: list[float]) -> None:
    with pytest.raises(InputError, match="mean, std: expected one of each per channel"):
        normalize(small_cnn(), mean, std)


@pytest.mark.parametrize("name", ["repvgg_a0", "gernet_s"])
def test_other_families_stay_as_timm_makes_them(name: str) -> None:
    model, theirs = create_model(name, num_classes=4, image_size=32), timm.create_model(name, num_classes=4)
    theirs.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("resnet18", {"channels": (8, 8, 8, 8)}), ("resnet50", {}), ("vgg11_bn", {}), ("mobilevit_xxs", {})],
)
@pytest.mark.parametrize("side", [32, 64])
def test_small_images_keep_their_resolution(name: str, arguments: dict[str, Any], side: int) -> None:
    model = create_model(name, num_classes=7, in_chans=1, image_size=side, **arguments).eval()
    assert model(torch.rand(2, 1, side, side)).shape == (2, 7)
    seen: list[int] = []
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    model(torch.rand(1, 1, side, side))
    assert seen == [side]


def test_large_images_get_timms_own_network() -> None:
    ours, theirs = create_model("resnet18", num_classes=5), timm.create_model("resnet18", num_classes=5)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "resnet81"}, "model: timm has no architecture 'resnet81'; did you mean resnet"),
        ({"architecture": "qqqqq"}, r"see timm.list_models\(\)"),
        ({"num_classes": 0}, "num_classes"),
        ({"in_chans": 0}, "in_chans"),
        ({"image_size": 3.5}, "image_size"),
        ({"colour": "red"}, "model: timm cannot make 'resnet18'"),
    ],
)
def test_bad_models(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_model(**{"architecture": "resnet18", "num_classes": 4, **arguments})
