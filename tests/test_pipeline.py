"""mrpf, from measuring to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks

from tests.conftest import Batches, small_cnn, small_resnet, unchanged
from tp_mrs import InputError, mrpf
from tp_mrs.allocation import amount

EXAMPLE = torch.rand(1, 3, 32, 32)


@pytest.mark.parametrize(("budget", "rounds"), [({"macs": 0.5}, 1), ({"params": 0.4}, 2), ({"channels": 0.6}, 2)])
def test_the_budget_is_met_after_the_last_round(budget: Any, rounds: int, batches: Batches, tmp_path: Path) -> None:
    model = small_resnet()
    measure, target = next(iter(budget.items()))
    dense = amount(model, EXAMPLE, measure)
    model.eval()
    model.get_submodule("bn1").train()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    report = mrpf(
        model,
        EXAMPLE,
        batches,
        torchattacks.FGSM(model),
        **budget,
        rounds=rounds,
        test_data=batches,
        attacks=["fgsm"],
        objective="fgsm",
        lr=0.01,
    )
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert amount(model, EXAMPLE, measure) / dense == pytest.approx(target, rel=0.01)
    assert [r.target for r in report.rounds] == pytest.approx([target ** ((i + 1) / rounds) for i in range(rounds)])
    assert report.rounds[-1].reached == pytest.approx(target, rel=0.01)
    assert report.before is not None
    assert report.after is not None
    assert report.before.macs > report.after.macs
    assert set(report.rounds[0].ratios) == set(report.rounds[0].sensitivity.groups)
    assert json.loads(report.save(tmp_path / "r.json").read_text())["settings"]["budget"] == measure
    assert "fine-tuned" in str(report)
    assert len(report.plot().axes) == 3


def test_without_fine_tuning_or_test_data(batches: Batches) -> None:
    model = small_cnn()
    report = mrpf(model, EXAMPLE, batches, torchattacks.FGSM, macs=0.48, epochs=0)
    assert (report.before, report.after, report.rounds[0].finetuning) == (None, None, None)
    assert model(EXAMPLE).shape == (1, 4)


def test_same_seed_same_model(batches: Batches) -> None:
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = small_cnn()
        mrpf(model, EXAMPLE, batches, torchattacks.PGD, macs=0.48, seed=3)
        outputs.append(model.eval()(EXAMPLE))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"macs": 1.2}, "macs: expected"),
        ({"macs": 0.5, "params": 0.5}, "give exactly one budget"),
        ({"macs": 0.5, "rounds": 0}, "rounds"),
        ({"macs": 0.5, "epochs": -1}, "epochs"),
        ({"macs": 0.5, "alpha": -1}, "alpha"),
        ({"macs": 0.5, "min_keep": 2}, "min_keep"),
        ({"macs": 0.5, "objective": "pdg"}, "objective: expected one of"),
        ({"macs": 0.5, "learning_rate": 0.1}, "training arguments: .*learning_rate"),
        ({"macs": 0.5, "train_attack": "pdg"}, "attack: no torchattacks attack is called 'pdg'"),
        ({"macs": 0.5, "attacks": ["pdg"], "test_data": []}, "attack: no torchattacks attack is called 'pdg'"),
        ({"macs": 0.5, "base": "l7"}, "base"),
        ({"macs": 0.5, "attack": torchattacks.FGSM(small_cnn())}, "attack: this FGSM is bound to another model"),
        ({"macs": 0.001}, "macs=0.001: can't be met"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], message: str, batches: Batches) -> None:
    model = small_cnn()
    with unchanged(model), pytest.raises(InputError, match=message):
        mrpf(model, EXAMPLE, batches, **{"attack": torchattacks.FGSM, **arguments})
