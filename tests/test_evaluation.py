"""evaluate: counted by hand, any attack, and no trace in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchattacks
from torch import nn

from tests.conftest import Batches, small_cnn, unchanged
from tp_mrs import DivergenceError, InputError, evaluate
from tp_mrs.evaluation import measure_latency


def test_counts_by_hand() -> None:
    class Bright(nn.Module):
        """Class 1 where the first pixel is above one half."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(10.0))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            score = self.scale * (images[:, 0, 0, 0] - 0.5)
            return torch.stack([-score, score], dim=1)

    images = torch.tensor([0.1, 0.45, 0.52, 0.9]).view(4, 1, 1, 1)
    result = evaluate(Bright(), [(images, torch.tensor([0, 0, 1, 0]))], ["fgsm"], eps=0.1, latency=False)
    assert result.clean == 0.75  # the last one is mislabelled
    assert result.robust == {"fgsm": 0.25}  # 0.45 → 0.55 and 0.52 → 0.42 cross over
    assert (result.images, result.params, result.latency_ms) == (4, 1, None)
    assert "clean 75.0%" in str(result)


def test_no_perturbation_is_clean(batches: Batches) -> None:
    result = evaluate(small_cnn(), batches, ["pgd-3", "fgsm"], eps=0, latency=False)
    assert result.robust == {"pgd-3": result.clean, "fgsm": result.clean}


@pytest.mark.parametrize("attacks", [["fgsm", "pgd-3"], ["cw"], [torchattacks.FGSM, torchattacks.FGSM], ["square"]])
def test_no_trace(attacks: Any, batches: Batches) -> None:
    model = small_cnn()
    if attacks == ["square"]:
        attacks = [lambda m: torchattacks.Square(m, n_queries=5)]
    with unchanged(model):
        result = evaluate(model, batches, attacks, latency=False)
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
        ({"attacks": ["pdg"]}, "attack: no torchattacks attack is called 'pdg'; did you mean 'pgd'"),
        ({"attacks": ["fgsm-3"]}, "attack: 'fgsm-3' has a step count that FGSM does not take"),
        ({"attacks": ["multiattack"]}, "attack: no torchattacks attack is called 'multiattack'"),
        ({"attacks": "fgsm"}, r"attacks: expected a list of attacks.*write \['fgsm'\]"),
        ({"attacks": [torchattacks.FGSM(small_cnn())]}, "attack: this FGSM is bound to another model"),
        ({"eps": -1}, "eps: expected a value in"),
        ({"eps": "abc"}, "eps: expected a number or a fraction such as 8/255, got 'abc'"),
        ({"max_batches": 0}, "max_batches"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, batches: Batches) -> None:
    model = small_cnn()
    with unchanged(model), pytest.raises(InputError, match=message):
        evaluate(model, batches, **arguments)


def test_a_model_that_returns_nan(batches: Batches) -> None:
    model: Any = small_cnn()
    torch.nn.init.constant_(model[7].weight, float("nan"))
    with pytest.raises(DivergenceError, match="the model returned NaN"):
        evaluate(model, batches, [])


def test_no_data(cnn: nn.Module) -> None:
    with pytest.raises(InputError, match="data: it yielded no batch"):
        evaluate(cnn, [])
