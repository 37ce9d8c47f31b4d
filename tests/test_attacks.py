"""Names, sizes and step counts of attacks."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torchattacks
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.conftest import small_cnn, unchanged
from tp_mrs import InputError
from tp_mrs.attacks import bind, named_attack, parse_eps
from tp_mrs.errors import DivergenceError


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), ("0.03", 0.03), (0.1, 0.1), ("0", 0.0), ("1", 1.0), ("1e-2", 0.01), (1, 1.0)],
)
def test_eps(text: str | float, value: float) -> None:
    assert parse_eps(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["abc", "", "8/0", "-1", "-8/255", "1.01", "nan", "inf", "8//255", "1e999", None])
def test_bad_eps(text: str) -> None:
    with pytest.raises(InputError, match="eps: expected"):
        parse_eps(text)


@given(st.text(max_size=8))
def test_any_text_is_a_size_or_an_input_error(text: str) -> None:
    with contextlib.suppress(InputError):
        assert 0 <= parse_eps(text) <= 1


def test_whole_pixels_get_a_hint() -> None:
    with pytest.raises(InputError, match="did you mean 8/255"):
        parse_eps("8")


def test_step_counts_and_sizes() -> None:
    model = small_cnn()
    attack = named_attack("pgd-20", eps=0.1)(model)
    assert (attack.steps, attack.eps, attack.alpha) == (20, 0.1, 0.025)
    assert named_attack("FFGSM", eps=0.1)(model).alpha == pytest.approx(0.125)
    assert named_attack("autoattack", eps=0.1, num_classes=4)(model).n_classes == 4


@pytest.mark.parametrize("name", [name for name in torchattacks.__all__ if name not in ("MultiAttack", "LGV")])
def test_every_torchattacks_class_has_a_name(name: str) -> None:
    assert type(named_attack(name.lower(), eps=0.1)(small_cnn())).__name__ == name


@pytest.mark.parametrize("name", ["none", "fgsm", "pgd-3", "ffgsm", "tpgd-2", "mifgsm-2", "apgd-2"])
def test_perturbations_stay_in_the_ball_and_leave_no_trace(name: str) -> None:
    model, images = small_cnn(), torch.rand(4, 3, 16, 16)
    perturb = bind(named_attack(name, eps=0.03), model)
    flags = [module.training for module in model.modules()]
    with unchanged(model):
        torch.get_rng_state()
        with torch.random.fork_rng():
            adversarial = perturb(images, torch.randint(4, (4,)))
    assert flags
    assert (adversarial - images).abs().max() <= 0.03 + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


def test_an_attack_that_returns_nan() -> None:
    class Breaks(torchattacks.FGSM):
        def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return images * float("nan")

    with pytest.raises(DivergenceError, match="attack: FGSM returned NaN"):
        bind(Breaks, small_cnn())(torch.rand(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))


def test_an_attack_on_another_device() -> None:
    model = small_cnn()
    attack = torchattacks.FGSM(model)
    attack.set_device(torch.device("meta"))
    with pytest.raises(InputError, match="attack: built for meta, but the model is on cpu"):
        bind(attack, model)


def test_parts_on_several_devices() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1).to("meta"))
    with pytest.raises(InputError, match="model: expected all parameters on one device, found cpu, meta"):
        bind(torchattacks.FGSM, model)
