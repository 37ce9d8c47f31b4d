"""Masked gradients are noticed, noise and sound models are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import unchanged
from tp_mrs import evaluate
from tp_mrs.masking import IMAGES, Sample, contradictions
from tp_mrs.proportions import Outcomes


def withstood(images: int, *fooled: range) -> Outcomes:
    outcome = np.ones(images, dtype=np.bool_)
    for part in fooled:
        outcome[list(part)] = False
    return outcome


@pytest.mark.parametrize(
    ("weak", "strong", "reason"),
    [
        ("fgsm", "pgd-20", "many steps"),
        ("FFGSM", "apgd-10", "many steps"),
        ("square", "pgd-10", "sees gradients"),
        ("square-100", "square", "more steps"),
        ("pgd-20", "pgd-50", "more steps"),
        ("pgd-20", "pgd-20x5", "more steps and restarts"),
        ("square", "autoattack", "AutoAttack should be the strongest"),
    ],
)
def test_a_weaker_attack_that_does_better(weak: str, strong: str, reason: str) -> None:
    few, many = withstood(100, range(5)), withstood(100, range(5, 30))
    (sentence,) = contradictions({strong: few, weak: many})
    assert sentence.startswith(f"{weak} fools the model on 25 images that withstand {strong}, and {strong} on 5")
    assert reason in sentence
    assert not contradictions({strong: many, weak: few})


@pytest.mark.parametrize(
    ("one", "other"),
    [("fgsm", "square"), ("fgsm", "pgd-3"), ("pgd-50", "pgd-20x5"), ("pgd-20", "apgd-20"), ("mifgsm", "pgd-20")],
)
def test_attacks_of_unknown_order(one: str, other: str) -> None:
    few, many = withstood(100), withstood(100, range(30))
    assert not contradictions({one: few, other: many})
    assert not contradictions({one: many, other: few})


def test_noise_does_not_warn() -> None:
    assert not contradictions({"pgd-20": withstood(1000), "fgsm": withstood(1000, range(9))})  # chance 0.2%
    assert contradictions({"pgd-20": withstood(1000), "fgsm": withstood(1000, range(10))})  # 0.098%
    generator = np.random.default_rng(0)
    for _ in range(100):
        hard = generator.random(500) < 0.5
        runs = [hard ^ (generator.random(500) < 0.05) for _ in range(2)]
        assert not contradictions({"pgd-20": runs[0], "pgd-50": runs[1]})


def test_a_wide_gap_to_autoattack() -> None:
    pgd = withstood(500, range(200))
    assert not contradictions({"pgd-20": pgd, "autoattack": withstood(500, range(230))})
    (sentence,) = contradictions({"pgd-20": pgd, "autoattack": withstood(500, range(300))})
    assert sentence.startswith("autoattack leaves 20.0 percentage points fewer images than pgd-20")


class Linear(nn.Module):
    """Four classes, each by its template, with ways to hide the gradient."""

    def __init__(self, scale: float = 1.0, levels: int = 0) -> None:
        super().__init__()
        self.templates = nn.Linear(3 * 8 * 8, 4)
        self.scale, self.levels = scale, levels

    def forward(self, images: Tensor) -> Tensor:
        if self.levels:
            images = (images * self.levels).round() / self.levels
        return self.scale * self.templates(images.flatten(1))


def labelled(model: nn.Module, count: int = 120) -> list[tuple[Tensor, Tensor]]:
    images = torch.rand(count, 3, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    return [(images[:70], labels[:70]), (images[70:], labels[70:])]


def assess(model: nn.Module, attacks: list[Any], **arguments: Any) -> tuple[str, ...]:
    data = labelled(model)
    with unchanged(model):
        return evaluate(model, data, attacks, eps=0.02, latency=False, **arguments).warnings


@pytest.mark.parametrize("hidden", [{"scale": 1e6}, {"levels": 4}], ids=["saturated", "rounded"])
def test_masked_models_are_noticed(hidden: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = Linear(**hidden)
    (sentence,) = assess(model, ["pgd-10", "square-300"])
    assert "sees gradients should fool it no less often" in sentence
    assert [record.getMessage() for record in caplog.records] == [sentence]
    assert any("gradient of exactly zero" in sentence for sentence in assess(model, ["fgsm"], masking=True))


def test_no_perturbation_is_too_large_for_a_sound_model() -> None:
    large = [sentence for sentence in assess(Linear(scale=1e5), [], masking=True) if "at eps 0.5" in sentence]
    assert len(large) == 1
    assert "pgd-20 at eps 0.5, which can turn every image grey, leaves the model right on" in large[0]


@pytest.mark.parametrize("scale", [0.1, 1, 30])
def test_a_sound_model_does_not_warn(scale: float) -> None:
    attacks = ["fgsm", "pgd-10", "pgd-10x2", "pgd-20", "square-100"]
    assert assess(Linear(scale), attacks, masking=True) == ()


def test_a_model_that_says_one_class_only_is_weak_not_masked() -> None:
    model = Linear(scale=1e-6)
    with torch.no_grad():
        model.templates.bias[0] += 1e6
    images = torch.rand(90, 3, 8, 8)
    data = [(images, torch.arange(90) % 3)]
    assert evaluate(model, data, ["fgsm", "pgd-10"], latency=False, masking=True).warnings == ()


def test_a_sample_is_spread_over_all_images() -> None:
    sample = Sample()
    for start in range(0, 1000, 50):
        numbers = torch.arange(start, start + 50)
        sample.add(numbers.view(-1, 1, 1, 1).float(), numbers)
    kept = torch.cat([labels for _, labels in sample.batches()])
    assert IMAGES / 2 <= len(kept) <= IMAGES
    assert len(kept.diff().unique()) == 1
    assert (int(kept[0]), int(kept[-1]) > 990) == (0, True)
