"""Attention after pruning: it computes what it did, whichever way timm computes it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from timm.layers.attention import Attention
from torch import Tensor, nn

import tp_mrs


class Tokens(nn.Module):
    """A patch embedding, one attention, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attn, self.head = (
            nn.Conv2d(3, 12, 4, 4),
            Attention(12, num_heads=3, qkv_bias=True),
            nn.Linear(12, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def prune(model: nn.Module, images: Tensor, **kwargs: Any) -> None:
    arguments = {**tp_mrs.pruner_kwargs(model), **kwargs}
    pruner = tp.pruner.BasePruner(model, images, importance=tp.importance.MagnitudeImportance(), **arguments)
    pruner.step()
    tp_mrs.refresh(model)


def silence(attention: Any, *, heads: tuple[int, ...] = (), dims: tuple[int, ...] = ()) -> None:
    """Zero whole heads, and some dimensions of every head, so that they carry nothing and weigh least."""
    size = attention.head_dim
    for head in range(attention.num_heads):
        for dim in range(size):
            if head in heads or dim in dims:
                for part in range(3):
                    attention.qkv.weight.data[part * attention.attn_dim + head * size + dim] = 0
                    attention.qkv.bias.data[part * attention.attn_dim + head * size + dim] = 0
                attention.proj.weight.data[:, head * size + dim] = 0


@pytest.mark.parametrize("fused", [True, False])
def test_narrower_heads_compute_the_same(fused: bool) -> None:
    model, images = Tokens().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    model.attn.fused_attn = fused
    silence(model.attn, dims=(1, 3))
    before = model(images)
    prune(model, images, pruning_ratio_dict={model.attn.qkv: 0.5}, pruning_ratio=0.0)
    attention = model.attn
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (3, 2, 6)
    assert attention.qkv.weight.shape == (18, 12)
    torch.testing.assert_close(model(images), before)
    attention.fused_attn = not fused
    torch.testing.assert_close(model(images), before)


@pytest.mark.parametrize("narrow", [True, False])
def test_fewer_heads_compute_the_same(narrow: bool) -> None:
    model, images = Tokens().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    silence(model.attn, heads=(1,), dims=(2, 3) if narrow else ())
    before = model(images)
    prune(
        model,
        images,
        prune_num_heads=True,
        head_pruning_ratio=0.3,
        prune_head_dims=narrow,
        pruning_ratio=0.0,
        pruning_ratio_dict={model.attn.qkv: 0.5},
    )
    attention = model.attn
    assert (attention.num_heads, attention.head_dim) == (2, 2 if narrow else 4)
    torch.testing.assert_close(model(images), before)


def test_refreshing_again_changes_nothing() -> None:
    model, images = Tokens().eval(), torch.rand(1, 3, 16, 16)
    prune(model, images, pruning_ratio=0.5)
    state, numbers = (
        copy.deepcopy(model.state_dict()),
        {k: v for k, v in vars(model.attn).items() if not k.startswith("_")},
    )
    tp_mrs.refresh(model)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert {k: v for k, v in vars(model.attn).items() if not k.startswith("_")} == numbers


def test_an_unpruned_model_is_left_alone() -> None:
    model = timm.create_model("mobilevit_xxs", num_classes=3)
    state = copy.deepcopy(model.state_dict())
    assert tp_mrs.refresh(model) is model
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_heads_that_were_not_pruned_after_all_stay() -> None:
    """`interactive=True` lets the user pass over a group whose heads the pruner has already crossed off its list."""
    model, images = Tokens().eval(), torch.rand(1, 3, 16, 16)
    pruner = tp.pruner.BasePruner(
        model,
        images,
        importance=tp.importance.MagnitudeImportance(),
        prune_num_heads=True,
        head_pruning_ratio=0.5,
        **tp_mrs.pruner_kwargs(model),
    )
    assert list(pruner.step(interactive=True))
    before = model(images)
    tp_mrs.refresh(model)
    assert model.attn.num_heads == 3
    torch.testing.assert_close(model(images), before)


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050", "poolformerv2_s12", "pit_ti_224", "nf_regnet_b0"])
def test_pruned_models_run_forward_and_backward(name: str) -> None:
    side = 224 if "224" in name else 64
    model, images = timm.create_model(name, num_classes=3), torch.rand(2, 3, side, side)
    before = sum(parameter.numel() for parameter in model.parameters())
    prune(model, images[:1], pruning_ratio=0.5)
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.7 * before
    model.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
def test_pruned_mobilevit_takes_other_image_sizes(name: str) -> None:
    model = tp_mrs.create_model(name, num_classes=3, image_size=64).eval()
    prune(model, torch.rand(1, 3, 64, 64), pruning_ratio=0.5)
    for side in (32, 96, 128):
        assert model(torch.rand(2, 3, side, side)).shape == (2, 3)


def test_layers_of_rigid_attention_keep_their_size() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, img_size=64, window_size=4)
    sizes = {
        name: module.out_features
        for name, module in model.named_modules()
        if name.endswith(("qkv", "proj")) and isinstance(module, nn.Linear)
    }
    prune(model, torch.rand(1, 3, 64, 64), pruning_ratio=0.5)
    assert {name: model.get_submodule(name).out_features for name in sizes} == sizes
    assert model.layers[0].blocks[0].mlp.fc1.out_features == 192


def test_classifiers_and_stiff_layers_are_ignored() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Flatten(), nn.Linear(32, 2))
    assert tp_mrs.pruner_kwargs(model)["ignored_layers"] == [model[3], model[1]]


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "tied"])
def test_layers_whose_weights_are_not_their_own_keep_their_sizes(kind: str) -> None:
    layers = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]
    if kind == "tied":
        layers[2].weight = layers[1].weight
    else:
        getattr(nn.utils.parametrizations, kind)(layers[1])
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    images = torch.rand(2, 3, 12, 12)
    report = tp_mrs.check_coupling(model, images)
    assert report.proven
    assert "2" in report.kept
    assert ("shares its weight" if kind == "tied" else "computes its weight") in report.kept["2"]
    prune(model, images, pruning_ratio=0.5)
    assert [layer.out_channels for layer in layers[1:]] == ([8, 8, 4] if kind == "tied" else [8, 4, 4])
    assert kind != "tied" or layers[2].weight is layers[1].weight


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_what_cannot_be_copied() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 1)), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(tp_mrs.InputError, match="model: it cannot be copied"):
        tp_mrs.check_coupling(model, torch.rand(1, 3, 2, 2))


@pytest.mark.skipif(not hasattr(nn, "RMSNorm"), reason="this torch has no nn.RMSNorm")
def test_rms_norms_follow() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b, self.head = nn.Conv2d(3, 8, 1), nn.RMSNorm(8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.norm(self.a(x).flatten(2).transpose(1, 2))).mean(1))

    model, images = Net(), torch.rand(1, 3, 4, 4)
    prune(model, images, pruning_ratio=0.5)
    assert model.norm.normalized_shape == (4,)
    assert model(images).shape == (1, 2)


def test_no_model() -> None:
    model: Any = "resnet18"
    with pytest.raises(tp_mrs.InputError, match=r"model: expected a torch\.nn\.Module, got str"):
        tp_mrs.pruner_kwargs(model)
    with pytest.raises(tp_mrs.InputError, match=r"model: expected a torch\.nn\.Module, got str"):
        tp_mrs.refresh(model)
