"""finetune: what changes and what doesn't, and refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import Batches, small_cnn, unchanged
from tp_mrs import DivergenceError, InputError, finetune
from tp_mrs.objectives import OBJECTIVES, standard


class Slope(nn.Module):
    """Logits (w x, 0) of a one-pixel image."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images: Tensor) -> Tensor:
        score = self.weight * images.flatten(1)
        return torch.cat([score, torch.zeros_like(score)], dim=1)


def pixel(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


LABEL = torch.zeros(1, dtype=torch.long)


def test_one_step_is_plain_gradient_descent() -> None:
    model = Slope(3.0)
    settings: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0, "schedule": "constant"}
    settings["optimizer"] = "momentum"  # timm's "sgd" is Nesterov's
    result = finetune(model, [(pixel(0.5), LABEL)], objective="standard", lr=0.1, clip_norm=None, **settings)
    gradient = -(1 - sigmoid(1.5)) * 0.5
    assert model.weight.item() == pytest.approx(3.0 - 0.1 * gradient, rel=1e-6)
    assert result.history[0].loss == pytest.approx(-math.log(sigmoid(1.5)), rel=1e-5)
    assert result.images == 1


@pytest.mark.parametrize("objective", [*OBJECTIVES, standard])
def test_training_lowers_the_loss_and_leaves_no_other_trace(objective: Any, batches: Batches) -> None:
    model = small_cnn()
    before = copy.deepcopy(model.state_dict())
    with unchanged(model, weights=False):
        result = finetune(model, batches, objective=objective, epochs=8, lr=0.05, eps=0.01)
    assert result.history[-1].loss < result.history[0].loss
    after = model.state_dict()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen
    for name in after:
        assert torch.equal(before[name], after[name]) == (name in frozen), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_precision_and_layout(precision: Any, channels_last: bool, batches: Batches) -> None:
    model = small_cnn()
    finetune(model, batches, precision=precision, channels_last=channels_last, eps=0.01)
    assert all(parameter.dtype == torch.float32 and parameter.is_contiguous() for parameter in model.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_same_seed_same_weights(batches: Batches) -> None:
    start = small_cnn()
    models = [copy.deepcopy(start) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        finetune(model, batches, seed=seed)
    first, again, other = (model.state_dict()["0.weight"] for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("epochs", "images"), [(0.5, 6), (1, 12), (1.5, 18), (3, 36)])
def test_fractions_of_epochs_count_in_batches(epochs: float, images: int, batches: Batches) -> None:
    assert finetune(small_cnn(), batches, objective="standard", epochs=epochs).images == images


def test_a_loader_is_shuffled_by_its_own_generator() -> None:
    images, labels = torch.rand(8, 3, 32, 32), torch.randint(4, (8,))
    loader = DataLoader(TensorDataset(images, labels), 4, shuffle=True)
    model = small_cnn()
    with unchanged(model, weights=False):
        finetune(model, loader, objective="standard")


def test_an_attack_of_ones_own(batches: Batches) -> None:
    result = finetune(small_cnn(), batches, attack=lambda m: torchattacks.MIFGSM(m, eps=0.02))
    assert result.settings["attack"].startswith("MIFGSM")
    assert "eps=0.02" in result.settings["attack"]


def test_an_objective_of_ones_own(batches: Batches) -> None:
    def smoothed(model: nn.Module, images: Tensor, labels: Tensor, attack: Any) -> Tensor:
        return F.cross_entropy(model(attack(images, labels)), labels, label_smoothing=0.1)

    assert finetune(small_cnn(), batches, objective=smoothed).settings["objective"] == "smoothed"


def test_frozen_norms_keep_their_statistics(batches: Batches) -> None:
    model = small_cnn()
    norm = model[1]  # type: ignore[index]
    norm.requires_grad_(False)
    before = norm.running_mean.clone()
    finetune(model, batches, objective="standard")
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "pdg"}, "objective: expected one of standard, fgsm, pgd, trades, mart"),
        ({"epochs": 0}, "epochs: expected a number > 0"),
        ({"lr": 0.0}, r"lr: expected a number in \(0, 10\]"),
        ({"lr": 1e9}, "lr"),
        ({"eps": 8}, "eps: expected a value in .0, 1.*did you mean 8/255"),
        ({"optimizer": "sgdd"}, "optimizer: expected one of"),
        ({"schedule": "linear"}, "schedule: expected one of cosine, constant"),
        ({"warmup": 2}, "warmup"),
        ({"momentum": 0.0}, "optimizer: timm cannot make 'sgd'.*Nesterov"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"accumulate": 0}, "accumulate: expected an integer >= 1"),
        ({"precision": "fp16"}, "precision: expected one of fp32, bf16"),
        ({"attack": torchattacks.FGSM(small_cnn())}, "attack: this FGSM is bound to another model"),
        ({"train_data": [{"image": 1, "label": 2}]}, "data: expected batches of"),
        ({"train_data": [(torch.rand(2, 3, 32, 32).numpy(), torch.tensor([0, 1]))]}, "images: expected a floating"),
        ({"train_data": []}, r"len\(train_data\)"),
        ({"train_data": iter([])}, "train_data: expected a DataLoader or a list"),
        ({"train_data": [(torch.rand(2, 3, 32, 32), torch.tensor([0, 9]))]}, "labels: expected classes 0 to 3"),
        ({"train_data": [(torch.rand(2, 3, 32, 32) + 1, torch.tensor([0, 1]))]}, "images: expected values in"),
        (
            {"objective": lambda model, images, labels, attack: model(images)},
            "objective: expected it to return a scalar",
        ),
        ({"objective": lambda model, images, labels, attack: 3.0}, "objective: .* got float"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], message: str, batches: Batches) -> None:
    model = small_cnn()
    data = arguments.pop("train_data", batches)
    statistics = isinstance(arguments.get("objective"), str) or "objective" not in arguments
    with unchanged(model, weights=statistics), pytest.raises(InputError, match=message):
        finetune(model, data, **arguments)


def test_a_frozen_model(batches: Batches) -> None:
    with pytest.raises(InputError, match="model: none of its parameters requires a gradient"):
        finetune(small_cnn().requires_grad_(False), batches)


def test_int32_labels(batches: Batches) -> None:
    assert finetune(small_cnn(), [(images, labels.int()) for images, labels in batches]).images == 12


def test_a_loss_that_is_not_finite_stops_training(batches: Batches) -> None:
    def explodes(model: nn.Module, images: Tensor, labels: Tensor, attack: Any) -> Tensor:
        return model(images).sum() * float("nan")

    model = small_cnn()
    with unchanged(model, weights=False), pytest.raises(DivergenceError, match=r"batch 1 of 2.*lower lr"):
        finetune(model, batches, objective=explodes)
