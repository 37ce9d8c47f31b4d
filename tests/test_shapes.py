"""Tensors of pruned shapes in layers of every kind: what fits, and that the layers' sizes follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, LayerNorm2d, RmsNorm
from torch import Tensor, nn

from tp_mrs import InputError
from tp_mrs.shapes import check_fit, fill, slots


def own(model: nn.Module) -> dict[str, Tensor]:
    return {name: slot.tensor.detach() for name, slot in slots(model).items() if slot.tensor is not None}


def put(small: nn.Module, big: nn.Module, **arguments: Any) -> nn.Module:
    fill(check_fit(big, own(small), **arguments), own(small), **arguments)
    return big


IMAGES = torch.rand(2, 6, 5, 5)
TOKENS = torch.rand(2, 5, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Tensor]] = {
    "conv": (lambda: nn.Conv2d(6, 4, 3), lambda: nn.Conv2d(12, 10, 3), IMAGES),
    "conv1d": (lambda: nn.Conv1d(5, 4, 3), lambda: nn.Conv1d(12, 10, 3), TOKENS),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), lambda: nn.Conv2d(12, 10, 3, groups=2), IMAGES),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda: nn.Conv2d(9, 9, 3, groups=9), IMAGES),
    "depthwise x2": (lambda: nn.Conv2d(6, 12, 3, groups=6), lambda: nn.Conv2d(9, 18, 3, groups=9), IMAGES),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3), lambda: nn.ConvTranspose2d(12, 9, 3), IMAGES),
    "transposed grouped": (
        lambda: nn.ConvTranspose2d(6, 4, 3, groups=2),
        lambda: nn.ConvTranspose2d(12, 10, 3, groups=2),
        IMAGES,
    ),
    "transposed depthwise x2": (
        lambda: nn.ConvTranspose2d(6, 12, 3, groups=6),
        lambda: nn.ConvTranspose2d(9, 18, 3, groups=9),
        IMAGES,
    ),
    "linear": (lambda: nn.Linear(6, 4), lambda: nn.Linear(9, 9), TOKENS),
    "batch norm": (lambda: nn.BatchNorm2d(6), lambda: nn.BatchNorm2d(9), IMAGES),
    "batch norm without scale": (
        lambda: nn.BatchNorm2d(6, affine=False),
        lambda: nn.BatchNorm2d(9, affine=False),
        IMAGES,
    ),
    "timm's batch norm": (lambda: BatchNormAct2d(6), lambda: BatchNormAct2d(9), IMAGES),
    "instance norm": (
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm2d(9, affine=True, track_running_stats=True),
        IMAGES,
    ),
    "layer norm": (lambda: nn.LayerNorm(6), lambda: nn.LayerNorm(9), TOKENS),
    "layer norm of two": (lambda: nn.LayerNorm((5, 6)), lambda: nn.LayerNorm((5, 9)), TOKENS),
    "timm's layer norm": (lambda: LayerNorm2d(6), lambda: LayerNorm2d(9), IMAGES),
    "timm's rms norm": (lambda: RmsNorm(6), lambda: RmsNorm(9), TOKENS),
    "group norm": (lambda: nn.GroupNorm(3, 6), lambda: nn.GroupNorm(3, 9), IMAGES),
    "prelu": (lambda: nn.PReLU(6), lambda: nn.PReLU(9), IMAGES),
    "embedding": (lambda: nn.Embedding(9, 4), lambda: nn.Embedding(9, 7), torch.tensor([[0, 8, 3]])),
    "table": (lambda: Table(5, 6), lambda: Table(5, 9), TOKENS),
}


class Table(nn.Module):
    """An un-wrapped parameter, such as a table of positions."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(1, tokens, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.table


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_becomes_the_smaller_one(name: str) -> None:
    make_small, make_big, inputs = LAYERS[name]
    small, big = make_small(), make_big()
    for parameter in small.parameters():
        nn.init.uniform_(parameter)
    put(small, big)
    assert torch.equal(big.eval()(inputs), small.eval()(inputs))
    assert repr(big) == repr(small)
    sizes = {key: value for key, value in vars(small).items() if isinstance(value, (int, tuple))}
    assert {key: vars(big)[key] for key in sizes} == sizes


@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 7}])
def test_multi_head_attention(sizes: dict[str, int]) -> None:
    small = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
    big: Any = put(small, nn.MultiheadAttention(12, 2, batch_first=True, **dict.fromkeys(sizes, 9)))
    query, key, value = torch.rand(1, 3, 8), torch.rand(1, 4, small.kdim), torch.rand(1, 4, small.vdim)
    assert torch.equal(big(query, key, value)[0], small(query, key, value)[0])
    assert (big.embed_dim, big.kdim, big.vdim, big.head_dim) == (8, small.kdim, small.vdim, 4)


def test_groups_that_shapes_do_not_tell() -> None:
    small = nn.Conv2d(9, 9, 3, groups=9)  # one output of two is left in each group
    big = put(small, nn.Conv2d(9, 18, 3, groups=9), groups={"": 9})
    images = torch.rand(1, 9, 5, 5)
    assert torch.equal(big(images), small(images))


def test_recurrent_layers_use_their_new_weights() -> None:
    small, big = nn.GRU(3, 4), nn.GRU(3, 4)
    put(small, big)
    signal = torch.rand(5, 1, 3)
    assert torch.equal(big(signal)[0], small(signal)[0])


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 6),
    multiplier=st.integers(1, 4),
    more=st.integers(1, 5),
    transposed=st.booleans(),
)
def test_any_depthwise_convolution(channels: int, multiplier: int, more: int, transposed: bool) -> None:
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    full = channels + more
    small = kind(channels, channels * multiplier, 3, groups=channels)
    big = put(small, kind(full, full * multiplier, 3, groups=full))
    signal = torch.rand(1, channels, 7)
    assert torch.equal(big(signal), small(signal))


def replaced(model: nn.Module, **tensors: Tensor) -> dict[str, Tensor]:
    return {**own(model), **tensors}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(4, 3, 3)}, "weight has shape"),
        ({"weight": torch.zeros(9, 6, 3, 3)}, "weight has shape"),
        ({"weight": torch.zeros(0, 6, 3, 3)}, "weight has shape"),
        ({"weight": torch.zeros(8, 6, 2, 3)}, "weight has shape"),
        ({"weight": torch.zeros(7, 6, 3, 3)}, r"lengths: \[7, 8\]"),
        ({"bias": torch.zeros(7)}, r"lengths: \[7, 8\]"),
        (
            {"bias": torch.zeros(8, dtype=torch.int64)},
            "bias has type torch.int64, the architecture's is floating point",
        ),
        ({"bias": torch.zeros(8, dtype=torch.bool)}, "bias has type torch.bool"),
        ({"bias": torch.zeros(8, dtype=torch.float8_e4m3fn)}, "bias has type torch.float8_e4m3fn"),
        ({"other": torch.zeros(1)}, r"unexpected \['other'\]"),
    ],
)
def test_tensors_that_do_not_fit(tensors: dict[str, Tensor], message: str) -> None:
    layer = nn.Conv2d(6, 8, 3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(InputError, match=message):
        check_fit(layer, replaced(layer, **tensors))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("groups", [3, 8])
def test_groups_that_do_not_fit(groups: int) -> None:
    layer = nn.Conv2d(8, 8, 3, groups=4)
    with pytest.raises(InputError, match=f"{groups} groups do not divide"):
        check_fit(layer, own(layer), groups={"": groups})


def test_statistics_of_another_length_and_counters_of_another_shape() -> None:
    layer = nn.BatchNorm2d(4)
    with pytest.raises(InputError, match=r"lengths: \[3, 4\]"):
        check_fit(layer, replaced(layer, running_mean=torch.zeros(3)))
    with pytest.raises(InputError, match="num_batches_tracked has shape"):
        check_fit(layer, replaced(layer, num_batches_tracked=torch.zeros(1, dtype=torch.int64)))
    with pytest.raises(InputError, match=r"missing \['running_var'\]"):
        check_fit(layer, {name: tensor for name, tensor in own(layer).items() if name != "running_var"})
