"""Names, sizes and step counts of attacks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchattacks
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchattacks.attack import Attack

from tests.conftest import Bright, small_cnn, unchanged
from tp_mrs import InputError
from tp_mrs.attacks import L2_EPS, AttackName, bind, named_attack, parse_eps, parse_name
from tp_mrs.composed import Restarts, WithinL2
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


@pytest.mark.parametrize("name", [name for name in torchattacks.__all__ if name not in ("MultiAttack", "LGV")])
def test_every_torchattacks_class_has_a_name(name: str) -> None:
    assert named_attack(name.lower(), eps=0.1)(small_cnn()).attack == name


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("pgd", AttackName("PGD", 10, 1)),
        ("PGD-20", AttackName("PGD", 20, 1)),
        ("pgd-20x5", AttackName("PGD", 20, 5)),
        ("pgdx5", AttackName("PGD", 10, 5)),
        ("pgdl2-7x2", AttackName("PGDL2", 7, 2)),
        ("pixle", AttackName("Pixle", 1, 1)),
        ("square", AttackName("Square", 5000, 1)),
        ("square-100x2", AttackName("Square", 100, 2)),
        ("autoattack", AttackName("AutoAttack", 100, 1)),
        ("none", AttackName("VANILA", 1, 1)),
    ],
)
def test_names(name: str, parsed: AttackName) -> None:
    assert parse_name(name) == parsed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pgd-0", "step count that PGD does not take"),
        ("pgd-many", "step count that PGD does not take"),
        ("fgsm-3", "step count that FGSM does not take"),
        ("pgd-20x0", "number of restarts that PGD does not take"),
        ("bim-10x2", "number of restarts that BIM does not take"),  # it starts at the image
        ("pgd-20x", "no torchattacks attack is called"),
        ("", "no torchattacks attack is called"),
        ("-3", "no torchattacks attack is called"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_name(name)


@given(st.text(max_size=8))
def test_any_text_is_a_name_or_an_input_error(text: str) -> None:
    with contextlib.suppress(InputError):
        assert parse_name(text).steps >= 1


def test_sizes_in_other_norms() -> None:
    model = small_cnn()
    assert named_attack("pgdl2-20", eps=0.1)(model).eps == L2_EPS
    assert named_attack("pgdl2-20", eps=0.1)(model).alpha == L2_EPS / 4
    assert named_attack("pifgsm", eps=0.1)(model).max_epsilon == 0.1
    assert named_attack("cw", eps=0.1)(model).eps == L2_EPS
    assert named_attack("square-7", eps=0.1)(model).n_queries == 7


def test_autoattack_is_the_published_one() -> None:
    attack = named_attack("autoattack", eps=0.1, num_classes=100)(small_cnn())
    assert [part.attack for part in attack.attacks] == ["APGD", "APGDT", "FAB", "Square"]
    assert [part.steps for part in attack.attacks[:3]] == [100] * 3
    assert [part.n_target_classes for part in attack.attacks[1:3]] == [9, 9]
    assert {part.eps for part in attack.attacks} == {0.1}
    with pytest.raises(InputError, match="'autoattack' needs at least 4 classes"):
        named_attack("autoattack", eps=0.1, num_classes=3)
    with pytest.raises(InputError, match=r"AutoAttack needs weights in float32, found torch.bfloat16"):
        named_attack("autoattack", eps=0.1)(small_cnn().bfloat16())


class Nudge(Attack):
    """Adds the next of the given steps at each call: what a restart finds, decided by hand."""

    def __init__(self, model: nn.Module, *steps: float) -> None:
        super().__init__("Nudge", model)
        self.left = list(steps)
        self.calls: list[int] = []

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(images))
        return images + self.left.pop(0)


def test_restarts_by_hand() -> None:
    model = Bright()
    images, labels = torch.tensor([0.3, 0.45, 0.48]).view(3, 1, 1, 1), torch.zeros(3, dtype=torch.long)
    nudge = Nudge(model, 0.03, 0.10, 0.05, -0.2)
    adversarial = bind(Restarts(nudge, 4), model)(images, labels)
    # the first run fools the third image, the second the second; the first withstands all, and gets the highest loss
    assert adversarial.flatten().tolist() == pytest.approx([0.40, 0.55, 0.51])
    assert nudge.calls == [3, 2, 1, 1]


def test_restarts_stop_when_all_are_fooled() -> None:
    model = Bright()
    nudge = Nudge(model, 0.3, 0.3)
    Restarts(nudge, 2)(torch.full((2, 1, 1, 1), 0.4), torch.zeros(2, dtype=torch.long))
    assert nudge.calls == [2]


def test_only_small_perturbations_count() -> None:
    model, labels = Bright(), torch.zeros(2, dtype=torch.long)
    images = torch.full((2, 1, 1, 1), 0.4)
    assert torch.equal(WithinL2(Nudge(model, 0.3), 0.2)(images, labels), images)
    assert WithinL2(Nudge(model, 0.3), 0.4)(images, labels).flatten().tolist() == pytest.approx([0.7, 0.7])


def test_a_model_without_gradients() -> None:
    class Cut(Bright):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images.detach())

    model, images, labels = Cut(), torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    with unchanged(model), pytest.raises(InputError, match=r"its outputs have no gradient .* 'square'"):
        bind(torchattacks.FGSM, model)(images, labels)


@pytest.mark.parametrize("name", ["cw-2", "apgd-2", "square-2", "deepfool-2"])
def test_attacks_that_take_no_probabilities(name: str) -> None:
    model, images = small_cnn(), torch.rand(2, 3, 16, 16)
    with unchanged(model), pytest.raises(InputError, match=r"attack: .* takes no probabilities for labels.*'pgd-7'"):
        bind(named_attack(name, eps=0.1), model)(images, torch.full((2, 4), 0.25))


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


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda images: images[:1], r"got \(1, 3, 8, 8\), torch.float32"),
        (lambda images: images[..., :4, :4], r"got \(2, 3, 4, 4\)"),
        (lambda images: images.double(), "got .*torch.float64"),
        (lambda images: images.numpy(), "got ndarray"),
        (lambda images: None, "got NoneType"),
        (lambda images: images + 5, r"returned values from 5.* to 5.*; expected images in \[0, 1\]: clamp them"),
        (lambda images: images - 0.5, "returned values from -0.*clamp them"),
    ],
)
def test_an_attack_that_returns_something_else(change: Callable[[Any], Any], got: str) -> None:
    class Odd(torchattacks.FGSM):
        def forward(self, images: torch.Tensor, labels: torch.Tensor) -> Any:
            return change(images)

    images, model = torch.rand(2, 3, 8, 8) * 0.4, small_cnn()
    with unchanged(model), pytest.raises(InputError, match=f"^attack: .*FGSM .*{got}"):
        bind(Odd, model)(images, torch.zeros(2, dtype=torch.long))


def test_an_attack_that_works_in_place() -> None:
    class InPlace(torchattacks.FGSM):
        def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return images.zero_()

    images = torch.rand(2, 3, 8, 8)
    before = images.clone()
    bind(InPlace, small_cnn())(images, torch.zeros(2, dtype=torch.long))
    assert torch.equal(images, before)


def test_an_attack_that_returns_nan() -> None:
    class Breaks(torchattacks.FGSM):
        def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return images * float("nan")

    with pytest.raises(DivergenceError, match="attack: FGSM returned NaN"):
        bind(Breaks, small_cnn())(torch.rand(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))
    model: Any = small_cnn()
    nn.init.constant_(model[3].weight, math.nan)
    with pytest.raises(DivergenceError, match="attack: PGDL2 returned NaN or infinity: 3 is the first module"):
        bind(torchattacks.PGDL2, model)(torch.rand(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))


def test_sizes_that_belong_to_another_norm_or_range(caplog: pytest.LogCaptureFixture) -> None:
    model = small_cnn()
    bind(lambda model: torchattacks.PGDL2(model, eps=0.5), model)
    assert not caplog.messages
    for attack in (torchattacks.PGDL2(model, eps=8 / 255), torchattacks.APGD(model, norm="L2", eps=8 / 255)):
        bind(attack, model)
        assert "moves images by 0.0313725 in the L2 norm, which is next to nothing" in caplog.messages.pop()
    with pytest.raises(InputError, match=r"attack: this PGD's eps: expected .* got 8; did you mean 8/255\?"):
        bind(lambda model: torchattacks.PGD(model, eps=8), model)


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
