"""evaluate: counted by hand, any attack, and no trace in the model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torchattacks
from torch import nn
from torchattacks.attack import Attack

from tests.conftest import Batches, Bright, image_batches, small_cnn, unchanged
from tp_mrs import DivergenceError, Evaluation, InputError, evaluate
from tp_mrs.evaluation import measure_latency
from tp_mrs.proportions import paired_difference


def test_counts_by_hand() -> None:
    images = torch.tensor([0.1, 0.45, 0.52, 0.9]).view(4, 1, 1, 1)
    result = evaluate(Bright(), [(images, torch.tensor([0, 0, 1, 0]))], ["fgsm"], eps=0.1, latency=False)
    assert result.clean == 0.75  # the last one is mislabelled
    assert result.robust == {"fgsm": 0.25}  # 0.45 → 0.55 and 0.52 → 0.42 cross over
    assert (result.images, result.params, result.latency_ms) == (4, 1, None)
    assert "clean 75.0% (30.1–95.4), fgsm 25.0% (4.6–69.9), 0.0 M MACs" in str(result)
    assert result.outcome("clean").tolist() == [True, True, True, False]
    assert result.outcome("fgsm").tolist() == [True, False, False, False]
    assert result.outcomes == {"clean": "e0", "fgsm": "80"}
    assert result.interval("clean") == pytest.approx((0.300642, 0.954413), abs=1e-6)
    assert result.size_bytes == 4


class Add(Attack):
    """Adds a constant: an attack whose outcome is known by hand."""

    def __init__(self, model: nn.Module, amount: float) -> None:
        super().__init__("Add", model)
        self.amount = amount

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (images + self.amount).clamp(0, 1)


def brighter(model: nn.Module) -> Attack:
    return Add(model, 0.1)


def darker(model: nn.Module) -> Attack:
    return Add(model, -0.1)


def test_worst_case_by_hand() -> None:
    images, labels = torch.tensor([0.1, 0.45, 0.52, 0.9, 0.55]).view(5, 1, 1, 1), torch.tensor([0, 0, 1, 1, 0])
    result = evaluate(Bright(), [(images, labels)], [brighter, darker], latency=False)
    assert result.outcome("Add").tolist() == [True, False, True, True, False]
    assert result.outcome("Add (1)").tolist() == [True, True, False, True, True]  # it helps the mislabelled one
    assert result.outcome("worst").tolist() == [True, False, False, True, False]
    assert (result.clean, result.robust, result.worst) == (0.8, {"Add": 0.6, "Add (1)": 0.8}, 0.4)
    assert "worst 40.0% (11.8–76.9)" in str(result)
    assert json.loads(json.dumps(result.to_dict()))["worst"] == 0.4


def test_without_attacks(batches: Batches) -> None:
    result = evaluate(small_cnn(), batches, [], latency=False)
    assert (result.robust, result.worst, result.warnings) == ({}, result.clean, ())


def test_difference_on_the_same_images() -> None:
    first, second = small_cnn(), small_cnn()
    images, labels = (torch.cat(tensors) for tensors in zip(*image_batches(), strict=True))
    one = evaluate(first, [(images, labels)], ["fgsm"], latency=False)
    other = evaluate(second, zip(images.split(5), labels.split(5), strict=True), ["fgsm"], latency=False)
    difference = one.difference(other, "clean")
    assert difference == paired_difference(one.outcome("clean"), other.outcome("clean"))
    assert difference.mean == pytest.approx(one.clean - other.clean)
    assert one.difference(one) == paired_difference(one.outcome("worst"), one.outcome("worst"))


def test_differences_that_mean_nothing() -> None:
    model, ((images, labels), *_) = small_cnn(), image_batches()

    def assess(images: torch.Tensor, labels: torch.Tensor, attacks: Any = ("fgsm",), eps: float = 0.1) -> Evaluation:
        return evaluate(model, [(images, labels)], attacks, eps=eps, latency=False)

    here = assess(images, labels)
    for other in (
        assess(images.flip(0), labels.flip(0)),
        assess(images, (labels + 1) % 4),
        assess(images * 0.5, labels),
    ):
        with pytest.raises(InputError, match="other: made on other images, labels or another order"):
            here.difference(other)
    with pytest.raises(InputError, match=r"other: attacked with eps 0.2, here 0.1"):
        here.difference(assess(images, labels, eps=0.2))
    with pytest.raises(InputError, match="other: attacked by none, here by fgsm"):
        here.difference(assess(images, labels, ()))
    with pytest.raises(InputError, match="name: expected one of clean, fgsm, worst, got 'pgd'"):
        here.interval("pgd")


def test_an_attack_does_not_depend_on_the_others(batches: Batches) -> None:
    model = small_cnn()
    alone = evaluate(model, batches, ["pgd-3"], latency=False)
    among = evaluate(model, batches, ["square-5", "pgd-3x2", "fgsm", "pgd-3"], latency=False)
    assert among.outcomes["pgd-3"] == alone.outcomes["pgd-3"]
    assert not (among.outcome("pgd-3x2") & ~among.outcome("pgd-3")).any()  # the first run is the same


def test_unchanged_when_an_attack_fails(batches: Batches) -> None:
    class Fails(torchattacks.PGD):
        def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            super().forward(images, labels)
            self.model.train()
            raise KeyError("as attacks do")

    model = small_cnn()
    with unchanged(model), pytest.raises(KeyError):
        evaluate(model, batches, ["pgd-2x2", Fails], masking=True)


def test_no_perturbation_is_clean(batches: Batches) -> None:
    result = evaluate(small_cnn(), batches, ["pgd-3", "fgsm"], eps=0, latency=False)
    assert result.robust == {"pgd-3": result.clean, "fgsm": result.clean}


@pytest.mark.parametrize(
    "attacks", [["fgsm", "pgd-3x2"], ["cw", "pgdl2-2", "deepfool-2"], [torchattacks.FGSM] * 2, ["square-5", "apgd-2x2"]]
)
def test_no_trace(attacks: Any, batches: Batches) -> None:
    model = small_cnn()
    with unchanged(model):
        result = evaluate(model, batches, attacks, latency=False, masking=True)
    assert len(result.robust) == len(attacks)
    assert all(0 <= value <= 1 for value in result.robust.values())


def test_autoattack_runs_and_is_no_weaker_than_fgsm() -> None:
    model = small_cnn()
    data = [(torch.rand(4, 3, 16, 16), torch.randint(4, (4,)))]
    result = evaluate(model, data, ["fgsm", "autoattack"], eps=0.05, latency=False)
    assert result.robust["autoattack"] <= result.robust["fgsm"]


def test_instances_are_named_after_themselves(batches: Batches) -> None:
    model = small_cnn()
    result = evaluate(model, batches, [torchattacks.MIFGSM(model), torchattacks.MIFGSM(model, eps=0.1)], latency=False)
    assert list(result.robust) == ["MIFGSM", "MIFGSM (1)"]


def test_latency_is_a_time(cnn: nn.Module, example: torch.Tensor) -> None:
    with unchanged(cnn):
        assert 0 < measure_latency(cnn, example, seconds=0.02) < 1e4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attacks": ["pdg"]}, "attacks: no torchattacks attack is called 'pdg'; did you mean 'pgd'"),
        ({"attacks": ["fgsm-3"]}, "attacks: 'fgsm-3' has a step count that FGSM does not take"),
        (
            {"attacks": ["multiattack"]},
            "attacks: no torchattacks attack is called 'multiattack'; did you mean 'autoattack'",
        ),
        ({"attacks": "fgsm"}, r"attacks: expected a list of attacks.*write \['fgsm'\]"),
        ({"attacks": [torchattacks.FGSM(small_cnn())]}, "attacks: this FGSM is bound to another model"),
        ({"eps": -1}, "eps: expected a value in"),
        ({"eps": "abc"}, "eps: expected a number or a fraction such as 8/255, got 'abc'"),
        ({"eps": True}, "eps: expected a number or a fraction such as 8/255, got True"),
        ({"masking": 2}, "masking: expected True or False, got 2"),
        ({"latency": "no"}, "latency: expected True or False, got 'no'"),
        ({"attacks": None}, r"attacks: expected a list of attacks, such as \['pgd-20'\], got None"),
        ({"max_batches": 0}, "max_batches"),
        ({"seed": 2**32}, "seed: expected an integer from 0 to 4294967295, got 4294967296"),
        (
            {"attacks": [torchattacks.AutoAttack]},
            "attack: this AutoAttack was made for 10 classes, but the model has 4",
        ),
        ({"attacks": [lambda m: torchattacks.APGDT(m, n_classes=3)]}, "attack: this APGDT was made for 3 classes"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, batches: Batches) -> None:
    model = small_cnn()
    with unchanged(model), pytest.raises(InputError, match=message):
        evaluate(model, batches, **arguments)


def test_images_of_several_sizes(batches: Batches) -> None:
    data = [batches[0], (torch.rand(2, 3, 16, 16), torch.zeros(2, dtype=torch.long))]
    assert evaluate(small_cnn(), data, [], latency=False).images == 8
    model = small_cnn()
    with (
        unchanged(model),
        pytest.raises(InputError, match=r"masking: .*one size, found \(3, 32, 32\) and \(3, 16, 16\)"),
    ):
        evaluate(model, data, [], masking=True)


@pytest.mark.parametrize("attack", ["autoattack", lambda model: torchattacks.AutoAttack(model, n_classes=4)])
def test_autoattack_needs_full_precision(attack: Any, batches: Batches) -> None:
    model, data = small_cnn().bfloat16(), [(images.bfloat16(), labels) for images, labels in batches]
    with unchanged(model), pytest.raises(InputError, match=r"model: AutoAttack .*use model.float\(\)"):
        evaluate(model, data, [attack])


def test_autocast_outside_is_of_no_account(batches: Batches) -> None:
    model = small_cnn()
    expected = evaluate(model, batches, ["pgd-2"], latency=False)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert evaluate(model, batches, ["pgd-2"], latency=False) == expected


def test_a_model_that_returns_nan(batches: Batches) -> None:
    model: Any = small_cnn()
    torch.nn.init.constant_(model[7].weight, float("nan"))
    with pytest.raises(DivergenceError, match=r"the model returned NaN .*: 7 is the first module"):
        evaluate(model, batches, [])


def test_no_data(cnn: nn.Module) -> None:
    with pytest.raises(InputError, match="data: it yielded no batch"):
        evaluate(cnn, [])
