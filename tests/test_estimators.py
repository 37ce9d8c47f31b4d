"""MRS on networks small enough to work out by hand, and against a slow maximiser written another way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.conftest import Batches, small_cnn, unchanged
from tp_mrs import estimators
from tp_mrs.errors import DivergenceError
from tp_mrs.measuring import Estimator, measure, measured_weights


class TwoLayers(nn.Module):
    """f(x) = (w2 w1 x, 0) for a single pixel x: one weight a layer, so that everything has a closed form."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 1, 1, bias=False), nn.Linear(1, 2, bias=False)
        nn.init.constant_(self.first.weight, first)
        with torch.no_grad():
            self.second.weight.copy_(torch.tensor([[second], [0.0]]))

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images).flatten(1))


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def one_pixel(value: float = 0.5) -> Batches:
    return [(torch.full((1, 1, 1, 1), value), torch.zeros(1, dtype=torch.long))]


def test_first_order_on_two_layers_by_hand() -> None:
    # Logits are (z, 0) with z = b·a·x and label 0, so R = softplus(-z) and dR/dz = -σ(-z).
    a, b, x, epsilon = 2.0, 3.0, 0.5, 0.1
    slope = 1 / (1 + math.exp(a * b * x))
    result = measure(TwoLayers(a, b), one_pixel(x), torchattacks.VANILA, epsilon=epsilon)
    assert result.robust_loss == pytest.approx(softplus(-a * b * x), rel=1e-5)
    # ‖a‖ = 2 and |∂R/∂a| = σ b x; ‖(b, 0)‖ = 3, and ∂R/∂b = (-σ, +σ) a x has length √2 σ a x.
    assert result.modules["first"] == pytest.approx(epsilon * a * slope * b * x, rel=1e-5)
    assert result.modules["second"] == pytest.approx(epsilon * b * math.sqrt(2) * slope * a * x, rel=1e-5)


def test_pga_on_two_layers_by_hand() -> None:
    # The loss falls with z, so the worst change of a is -ε a, and that of (b, 0) is ε b along (-1, 1)/√2.
    a, b, x, epsilon = 2.0, 3.0, 0.5, 0.1
    result = measure(TwoLayers(a, b), one_pixel(x), torchattacks.VANILA, epsilon=epsilon, estimator="pga", steps=4)
    dense = softplus(-a * b * x)
    assert result.modules["first"] == pytest.approx(softplus(-(1 - epsilon) * a * b * x) - dense, rel=1e-4)
    worst = (b - math.sqrt(2) * epsilon * b) * a * x
    assert result.modules["second"] == pytest.approx(softplus(-worst) - dense, rel=1e-4)


def slow_maximum(model: nn.Module, name: str, batches: Batches, epsilon: float) -> float:
    """The worst loss on the sphere, found by Adam on an unconstrained direction from several starts."""
    parameters = {key: value.detach() for key, value in model.named_parameters()} | dict(model.named_buffers())
    weight = parameters[f"{name}.weight"]
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))

    def loss(direction: Tensor) -> Tensor:
        moved = weight + epsilon * weight.norm() * direction / direction.norm()
        logits = torch.func.functional_call(model, parameters | {f"{name}.weight": moved}, (images,))
        return F.cross_entropy(logits, labels)

    base, best = float(F.cross_entropy(model(images), labels).detach()), 0.0
    for start in range(3):
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(start)).requires_grad_()
        optimizer = torch.optim.Adam([direction], lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            (-loss(direction)).backward()
            optimizer.step()
        best = max(best, float(loss(direction).detach()) - base)
    return best


def test_pga_agrees_with_an_independent_maximiser(batches: Batches) -> None:
    model = small_cnn().eval()
    small = [(images[:, :, :8, :8], labels) for images, labels in batches]
    scores = measure(model, small, torchattacks.VANILA, estimator="pga", steps=20).modules
    for name in ("0", "3", "7"):
        assert scores[name] == pytest.approx(slow_maximum(model, name, small, 0.1), rel=0.03)


def test_more_steps_never_find_less(batches: Batches) -> None:
    model = small_cnn()
    scores = [measure(model, batches, torchattacks.VANILA, estimator="pga", steps=steps).modules for steps in (1, 3, 8)]
    for name in scores[0]:
        assert 0 <= scores[0][name] <= scores[1][name] <= scores[2][name]


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return measured_weights(model)[0]


def scores(model: nn.Module, batches: Batches, epsilon: float) -> dict[str, float]:
    _, shares = estimators.first_order(estimators.RobustLoss(model.eval(), batches), weights_of(model), epsilon)
    return {name: float(share.sum()) for name, share in shares.items()}


def test_no_radius_no_sensitivity(batches: Batches) -> None:
    model = small_cnn().eval()
    assert set(scores(model, batches, 0.0).values()) == {0.0}
    loss = estimators.RobustLoss(model, batches)
    base = loss.differentiate()
    weight = model.get_parameter("0.weight")
    assert weight.grad is not None
    found = estimators.projected_gradient_ascent(loss, [weight], [weight.grad], base=base, epsilon=0.0, steps=3)
    assert float(found.sum()) == 0.0


@settings(max_examples=25, deadline=None)
@given(epsilon=st.floats(1e-3, 1.0), factor=st.floats(0.1, 10.0))
def test_first_order_is_linear_in_the_radius(epsilon: float, factor: float) -> None:
    torch.manual_seed(0)
    model, batch = small_cnn(), [(torch.rand(3, 3, 6, 6), torch.tensor([0, 1, 2]))]
    one, other = scores(model, batch, epsilon), scores(model, batch, epsilon * factor)
    assert other == pytest.approx({name: score * factor for name, score in one.items()})


# --- blocks --------------------------------------------------------------------------------------------------------


def test_blocks_join_small_batches_and_split_large_ones() -> None:
    def sizes(*lengths: int) -> list[int]:
        batches = [(torch.full((n, 1, 1, 1), float(i)), torch.full((n,), i)) for i, n in enumerate(lengths)]
        blocks = estimators.in_blocks(batches)
        assert torch.equal(torch.cat([labels for _, labels in blocks]), torch.cat([labels for _, labels in batches]))
        return [len(labels) for _, labels in blocks]

    assert sizes(*[1] * 40) == [16, 16, 8]
    assert sizes(512) == [32] * 16
    assert sizes(10, 10, 40) == [10, 10, 14, 13, 13]


@pytest.mark.parametrize("estimator", ["first_order", "pga"])
def test_shares_of_blocks_add_up(estimator: Estimator) -> None:
    model, images = small_cnn(), torch.rand(40, 3, 10, 10)
    labels = torch.arange(40) % 4
    found = measure(model, [(images[:25], labels[:25]), (images[25:], labels[25:])], torchattacks.VANILA)
    assert found.blocks == (13, 12, 15)
    assert sum(found.blocks) == 40
    whole = measure(model, [(images, labels)], torchattacks.VANILA, estimator=estimator)
    other = measure(
        model, [(images[:9], labels[:9]), (images[9:], labels[9:])], torchattacks.VANILA, estimator=estimator
    )
    assert other.modules == pytest.approx(whole.modules, rel=1e-4)
    for name, shares in whole.shares.items():
        assert len(shares) == len(whole.blocks)
        assert sum(shares) == pytest.approx(whole.modules[name], rel=1e-9)


def test_shares_of_first_order_are_those_of_the_blocks_own_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "SMALLEST_BLOCK", 4)
    # A block's share is ε‖θ‖ times its part of the gradient along the direction of the whole.
    model, images, labels = small_cnn().eval(), torch.rand(8, 3, 10, 10), torch.arange(8) % 4
    blocks = list(zip(images.split(4), labels.split(4), strict=True))
    _, shares = estimators.first_order(estimators.RobustLoss(model, blocks), weights_of(model), 0.1)
    for name, weight in weights_of(model).items():
        parts = [
            torch.autograd.grad(F.cross_entropy(model(part), target, reduction="sum") / 8, weight)[0]
            for part, target in blocks
        ]
        direction = sum(parts, torch.zeros_like(weight))
        direction = direction / direction.norm()
        expected = [float((0.1 * weight.norm() * (part * direction).sum()).detach()) for part in parts]
        assert shares[name].tolist() == pytest.approx(expected, rel=1e-4)


def test_large_layers_are_split_by_a_sample_of_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = small_cnn().eval(), torch.rand(64, 3, 16, 16), torch.arange(64) % 4
    blocks = list(zip(images.split(8), labels.split(8), strict=True))

    def found() -> dict[str, Tensor]:
        return estimators.first_order(estimators.RobustLoss(model, blocks), weights_of(model), 0.1)[1]

    exact = found()
    monkeypatch.setattr(estimators, "SAMPLED_WEIGHTS", 150)
    sampled = found()
    assert float(sampled["3"].sum()) == pytest.approx(float(exact["3"].sum()), rel=1e-6)
    assert not torch.equal(sampled["3"], exact["3"])
    assert float((sampled["3"] - exact["3"]).abs().max()) < 0.5 * float(exact["3"].abs().max())


# --- several weights at once ----------------------------------------------------------------------------------------


def test_two_layers_together_by_hand() -> None:
    # Both move at once: a to (1-ε)a, and (b, 0) by εb along (-1, 1)/√2.
    a, b, x, epsilon = 2.0, 3.0, 0.5, 0.1
    model = TwoLayers(a, b).eval()
    loss = estimators.RobustLoss(model, one_pixel(x))
    base, _ = estimators.first_order(loss, weights_of(model), epsilon)
    weights = list(weights_of(model).values())
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    found = estimators.projected_gradient_ascent(loss, weights, gradients, base=base, epsilon=epsilon, steps=5)
    worst = (1 - epsilon) * a * (b - math.sqrt(2) * epsilon * b) * x
    assert float(found.sum()) == pytest.approx(softplus(-worst) - softplus(-a * b * x), rel=1e-4)
    assert float(weights[0].detach()) == a


@settings(max_examples=10, deadline=None)
@given(scale=st.floats(0.05, 20.0))
def test_a_layer_before_batchnorm_has_the_same_sensitivity_at_any_scale(scale: float) -> None:
    """The ball is relative: scale a weight up and the next layer down by as much, and nothing changes."""
    torch.manual_seed(3)
    model: Any = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batch = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))]
    before = measure(model, batch, torchattacks.VANILA).modules
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(scale)
        model[2].weight.div_(scale)
    after = measure(model, batch, torchattacks.VANILA).modules
    assert after == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms_of_large_tensors(scale: float) -> None:
    values = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).exp()
    expected = float(values.double().norm())
    assert estimators.norm(values * scale) == pytest.approx(expected * scale, rel=1e-6)
    assert estimators.norm(torch.zeros(3)) == 0
    assert math.isnan(estimators.norm(torch.tensor([1.0, math.nan])))


# --- what changes nothing, and what goes wrong ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 12])
def test_micro_batches_change_nothing(size: int) -> None:
    model = small_cnn()
    images, labels = torch.rand(12, 3, 16, 16), torch.randint(4, (12,))
    whole = measure(model, [(images, labels)], torchattacks.VANILA, estimator="pga")
    parts = list(zip(images.split(size), labels.split(size), strict=True))
    split = measure(model, parts, torchattacks.VANILA, estimator="pga")
    assert split.modules == pytest.approx(whole.modules, rel=1e-3, abs=1e-6)
    assert split.robust_loss == pytest.approx(whole.robust_loss, rel=1e-5)
    assert split.robust_accuracy == whole.robust_accuracy


def test_pga_puts_weights_back_when_a_pass_fails(batches: Batches) -> None:
    class FailsLater(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = small_cnn(), 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 8:
                raise RuntimeError("out of memory")
            return self.net(images)

    model = FailsLater()
    with unchanged(model), pytest.raises(RuntimeError, match="out of memory"):
        measure(model, batches, torchattacks.VANILA, estimator="pga", steps=5)


def test_infinite_weights_are_reported(batches: Batches) -> None:
    model: Any = small_cnn()
    nn.init.constant_(model[7].weight, math.inf)
    with pytest.raises(DivergenceError, match="7 is the first module to return NaN or infinity"):
        measure(model, batches, torchattacks.VANILA)


def test_infinite_gradients_are_reported(batches: Batches) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0).sqrt() + x

    convs = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    model = nn.Sequential(*convs, Root(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    with unchanged(model), pytest.raises(DivergenceError, match=r"the gradient of 1 .* the first one on the way back"):
        measure(model, batches, torchattacks.VANILA)
