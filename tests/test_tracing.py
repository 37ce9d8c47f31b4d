"""What the tracer shows Torch-Pruning: couplings that hold, and fences where it could not follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tp_mrs
from tests.conftest import small_resnet, unchanged
from tp_mrs.pruning import prunable_groups, pruner_kwargs
from tp_mrs.tracing import reasons_to_keep

IMAGES = torch.rand(1, 3, 8, 8)


class Net(nn.Module):
    """Two layers `a` and `b`, what a test does between them, and a classifier."""

    def __init__(self, between: Callable[[Tensor], Tensor], *, a: int = 8, b_in: int = 8, linear: bool = False) -> None:
        super().__init__()
        self.between, self.linear = between, linear
        self.a = nn.Conv2d(3, a, 1)
        self.b: nn.Module = nn.Linear(b_in, 6) if linear else nn.Conv2d(b_in, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.between(self.a(x)))
        return self.head(y.flatten(1, -2).mean(1) if self.linear else y.mean((2, 3)))


def prunable(model: nn.Module) -> dict[str, int]:
    report = tp_mrs.check_coupling(model, IMAGES)
    assert not report.faults, str(report)
    return {check.group: check.units for check in report.checks}


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def windows(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)


def patches(x: Tensor) -> Tensor:
    """As MobileViT unfolds, merging the channels with other axes on the way."""
    n, c, h, w = x.shape
    x = x.reshape(n * c * (h // 2), 2, w // 2, 2).transpose(1, 2)
    return x.reshape(n, c, -1, 4).transpose(1, 3).reshape(n * 4, -1, c)


def merge(x: Tensor) -> Tensor:
    """As Swin merges patches: four neighbours become one, with four times the channels."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)


@pytest.mark.parametrize("between", [tokens, windows, patches, lambda x: x.permute(0, 2, 3, 1).roll(1, 1)])
def test_moving_other_axes_couples(between: Callable[[Tensor], Tensor]) -> None:
    assert prunable(Net(between, linear=True)) == {"a": 8, "b": 6}


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x + x.relu(),
        lambda x: F.pad(x, (1, 1, 1, 1)),
        lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2),
        lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
        lambda x: x * x.mean(1, keepdim=True).sigmoid(),
        lambda x: x / (x.norm(p=2, dim=(2, 3), keepdim=True).mean(1, keepdim=True) + 1),
        lambda x: torch.cat([x, x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 1)], dim=3),
        lambda x: torch.stack([x, x.relu()], dim=1).sum(1),
    ],
)
def test_what_treats_all_channels_alike_couples(between: Callable[[Tensor], Tensor]) -> None:
    assert prunable(Net(between)) == {"a": 8, "b": 6}


@pytest.mark.parametrize(
    ("between", "width", "linear"),
    [
        (lambda x: torch.cat([x, x.relu()], dim=1), 16, False),
        (merge, 32, True),
        (lambda x: torch.cat([tokens(x), tokens(x).tanh()], dim=-1), 16, True),
        (lambda x: x.repeat(1, 2, 1, 1), 16, False),
    ],
)
def test_concatenations_couple(between: Callable[[Tensor], Tensor], width: int, linear: bool) -> None:
    assert prunable(Net(between, b_in=width, linear=linear)) == {"a": 8, "b": 6}


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.chunk(2, dim=1)[0] * x.chunk(2, dim=1)[1],
        lambda x: F.gelu(x.chunk(2, dim=1)[1]) + F.avg_pool2d(x.chunk(2, dim=1)[0], 3, 1, 1),
        lambda x: x.view(1, 2, x.shape[1] // 2, 8, 8).sigmoid().amax(1),
    ],
)
def test_gated_units_couple_their_halves(between: Callable[[Tensor], Tensor]) -> None:
    model = Net(between, b_in=4)
    assert prunable(model) == {"a": 4, "b": 6}
    pruner = tp.pruner.BasePruner(
        model,
        IMAGES,
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        iterative_steps=2,
        **pruner_kwargs(model),
    )
    for _ in range(2):
        pruner.step()
    assert model.a.out_channels == 4
    assert model(IMAGES).shape == (1, 2)


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@pytest.mark.parametrize(
    "between",
    [
        shuffle,
        lambda x: x.flip(1),
        lambda x: x[:, [3, 1, 2, 0, 7, 6, 5, 4]],
        lambda x: x.cumsum(1),
        lambda x: torch.cat([x[:, :4].sigmoid() * x[:, 4:]] * 2, dim=1),
        lambda x: torch.cat(x.split(4, dim=1), dim=1),
        lambda x: F.conv2d(x, torch.eye(8).to(x)[:, :, None, None]),
        lambda x: torch.einsum("nchw,cd->ndhw", x, torch.eye(8).to(x)),
        lambda x: x.transpose(1, 2),
        lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1),
        lambda x: x * torch.arange(8.0).view(1, 8, 1, 1),
        lambda x: x + x.transpose(1, 3),
        lambda x: (x.flatten(2).softmax(-1) @ x.flatten(2).transpose(1, 2)).unsqueeze(-1),
    ],
)
def test_the_rest_is_fenced(between: Callable[[Tensor], Tensor]) -> None:
    assert prunable(Net(between)) == {"b": 6}


def test_reasons_are_given() -> None:
    assert reasons_to_keep(Net(lambda x: x.cumsum(1)), IMAGES) == {"a": "cumsum mixes or moves the channels"}
    assert reasons_to_keep(Net(patches, linear=True), IMAGES) == {}
    assert list(reasons_to_keep(Net(shuffle), IMAGES)) == ["a"]
    with pytest.raises(tp_mrs.InputError, match=r"no prunable layers.*\(0: Linear takes another axis"):
        prunable_groups(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(2), nn.Linear(64, 10)), IMAGES)


def test_halves_that_go_separate_ways_are_fenced() -> None:
    assert prunable(Net(lambda x: torch.cat([x[:, :4].relu(), x[:, 4:]], dim=1))) == {"b": 6}


class Ghost(nn.Module):
    """Features and cheap copies of them, joined, and added to others of the whole width."""

    def __init__(self, *, uneven: bool = False) -> None:
        super().__init__()
        self.a, self.copy = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.third = nn.Conv2d(3, 4, 1) if uneven else None
        width = 20 if uneven else 16
        self.other, self.b, self.head = nn.Conv2d(3, width, 1), nn.Conv2d(width, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        parts = [y, self.copy(y).relu()] + ([] if self.third is None else [self.third(x)])
        return self.head(self.b(torch.cat(parts, dim=1) + self.other(x)).mean((2, 3)))


def test_copies_of_channels_go_together() -> None:
    model = Ghost()
    assert pruner_kwargs_after_tracing(model) == {model.other: 2}
    assert prunable(model) == {"other": 8, "b": 6}
    assert "b" in prunable(Ghost(uneven=True))
    assert len(prunable(Ghost(uneven=True))) == 1


def pruner_kwargs_after_tracing(model: nn.Module) -> dict[nn.Module, int]:
    arguments = pruner_kwargs(model)
    tp.pruner.BasePruner(model, IMAGES, importance=tp.importance.MagnitudeImportance(), **arguments)
    return {layer: count for layer, count in arguments["out_channel_groups"].items() if layer is not model.copy}


def test_changes_in_place() -> None:
    def between(x: Tensor) -> Tensor:
        y = x.relu()
        y += x
        return F.relu(y.mul_(2.0), inplace=True)

    def patched(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :2] = x[:, 2:4]
        return y

    def copied(x: Tensor) -> Tensor:
        y = x.clone()
        y.copy_(x.flip(1))
        return y

    assert prunable(Net(between)) == {"a": 8, "b": 6}
    assert prunable(Net(patched)) == {"b": 6}
    assert prunable(Net(copied)) == {"b": 6}


class Mixer(nn.Module):
    """Mixing tokens and channels in turn; only what is inside each mixing can lose channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.tokens, self.channels = (nn.Sequential(nn.Linear(n, 12), nn.GELU(), nn.Linear(12, n)) for n in (16, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = tokens(self.embed(x))
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(x)).mean(1))


def test_token_mixing() -> None:
    assert prunable(Mixer()) == {"tokens.0": 12, "channels.0": 12}


class Parameters(nn.Module):
    """Bare parameters: per channel, per head, per position."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 2)
        self.scale, self.position = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(1, 1, 8, 8))
        self.token, self.factor = nn.Parameter(torch.rand(1, 1, 8)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * self.scale.view(1, -1, 1, 1) + self.position
        x = torch.cat([tokens(x), self.token.expand(len(x), -1, -1)], dim=1) * self.factor
        return self.head(self.b(x.transpose(1, 2).unsqueeze(-1)).mean((2, 3)))


def test_bare_parameters() -> None:
    """The map of positions has its last axis where the images have theirs, and leaves the channels alone."""
    assert prunable(Parameters()) == {"a": 8, "b": 6}


KINDS = ("conv", "depthwise", "ghost", "grouped", "residual", "dense", "gate", "chunk", "norm")


@st.composite
def networks(draw: Any) -> nn.Module:
    """Stacks of what networks are made of."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 1)]
    width = 8
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(
            st.sampled_from(["conv", "depthwise", "ghost", "grouped", "residual", "dense", "gate", "chunk", "norm"])
        )
        layers.append(Block(kind, width))
        width = {"dense": 2 * width, "ghost": 2 * width, "chunk": width // 2 or 1}.get(kind, width)
        if not 4 <= width <= 32:
            layers.append(nn.Conv2d(width, 8, 1))
            width = 8
    flat = draw(st.booleans())
    side = 2 if flat else 1
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(width * side * side, 2))


class Block(nn.Module):
    """One block of the kind asked for."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        groups = {"depthwise": width, "ghost": width, "grouped": 2}.get(kind, 1)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.norm: nn.Module = nn.GroupNorm(2, width) if kind == "norm" else nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.kind == "residual":
            return x + y.relu()
        if self.kind in ("dense", "ghost"):
            return torch.cat([x, y], dim=1)
        if self.kind == "gate":
            return x * y.mean((2, 3), keepdim=True).sigmoid()
        if self.kind == "chunk":
            first, second = y.chunk(2, dim=1)
            return first * second.sigmoid()
        return y.sigmoid()


@settings(max_examples=40, deadline=None)
@given(networks(), st.integers(0, 3))
def test_whatever_is_stacked_is_coupled_rightly(model: nn.Module, seed: int) -> None:
    report = tp_mrs.check_coupling(model, IMAGES, seed=seed)
    assert not [check for check in report.faults if "too little" not in (check.fault or "")], f"{model}\n{report}"


def test_tracing_leaves_the_model_alone() -> None:
    model = small_resnet()
    images = torch.rand(1, 3, 32, 32)
    with unchanged(model):
        prunable_groups(model, images)


def test_an_error_while_tracing_leaves_no_hooks() -> None:
    """Torch-Pruning's own stay, if it is asked directly."""
    model = Net(lambda x: x[:, :5])
    with pytest.raises(tp_mrs.InputError, match="channels"):
        prunable_groups(model, IMAGES)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="channels"):
        tp.pruner.BasePruner(model, IMAGES, importance=tp.importance.MagnitudeImportance(), **pruner_kwargs(model))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_two_pruners_share_nothing() -> None:
    first, second = (Net(lambda x: x.chunk(2, dim=1)[0] * x.chunk(2, dim=1)[1], b_in=4) for _ in range(2))
    pruners = [
        tp.pruner.BasePruner(
            model, IMAGES, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5, **pruner_kwargs(model)
        )
        for model in (first, second)
    ]
    assert pruners[0].out_channel_groups == {first.a: 2}
    pruners[0].step()
    assert (first.a.out_channels, second.a.out_channels) == (4, 8)
