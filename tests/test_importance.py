"""MRSImportance inside Torch-Pruning's own pruners."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchattacks
from torch import Tensor, nn

from tests.conftest import Batches, small_cnn, small_resnet, unchanged
from tp_mrs import InputError, MRSImportance, pruner_kwargs, refresh

EXAMPLE = torch.rand(1, 3, 32, 32)


def prune(model: nn.Module, importance: Any, **arguments: Any) -> list[Any]:
    options = {"global_pruning": True, "pruning_ratio": 0.5} | arguments
    pruner = tp.pruner.BasePruner(model, EXAMPLE, importance=importance, **options, **pruner_kwargs(model))
    for _ in range(options.get("iterative_steps", 1)):
        pruner.step()
    return pruner.pruning_history()


def widths(model: nn.Module) -> dict[str, int]:
    return {name: module.out_channels for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


@pytest.mark.parametrize("global_pruning", [True, False])
@pytest.mark.parametrize("name", ["magnitude", "fpgm", "lamp", "bn_scale"])
def test_alpha_zero_is_the_base_exactly(name: str, global_pruning: bool, batches: Batches) -> None:
    base: Any = {
        "magnitude": tp.importance.MagnitudeImportance,
        "fpgm": tp.importance.FPGMImportance,
        "lamp": tp.importance.LAMPImportance,
        "bn_scale": tp.importance.BNScaleImportance,
    }[name]
    ours, theirs = small_resnet(), None
    theirs = copy.deepcopy(ours)
    importance = MRSImportance(ours, batches, torchattacks.FGSM, base=base(), alpha=0.0)
    history = prune(ours, importance, global_pruning=global_pruning)
    assert history == prune(theirs, base(), global_pruning=global_pruning)
    assert widths(ours) != widths(small_resnet())
    assert torch.equal(ours(EXAMPLE), theirs(EXAMPLE))


def test_alpha_zero_is_torch_prunings_taylor_on_the_adversarial_loss(batches: Batches) -> None:
    ours = small_resnet().eval()
    theirs = copy.deepcopy(ours)
    attack = torchattacks.FGSM(theirs)
    for images, labels in batches:
        (F.cross_entropy(theirs(attack(images, labels)), labels, reduction="sum") / 12).backward()
    history = prune(theirs, tp.importance.TaylorImportance())
    assert prune(ours, MRSImportance(ours, batches, torchattacks.FGSM, alpha=0.0)) == history


def test_sensitive_groups_are_pruned_less(batches: Batches) -> None:
    """With a base that tells channels apart but not groups, global pruning follows the sensitivity alone."""

    class Ramp(tp.importance.Importance):
        def __call__(self, group: Any) -> Tensor:
            return torch.linspace(0.5, 1.5, len(group[0].idxs))

    model = small_resnet()
    importance = MRSImportance(model, batches, torchattacks.FGSM, base=Ramp())
    groups = importance.sensitivity(EXAMPLE).groups
    before = widths(model)
    prune(model, importance, pruning_ratio=0.4)
    kept = {name: widths(model)[name] / before[name] for name in groups}
    ranked = sorted(groups, key=groups.__getitem__)
    assert sum(kept[name] for name in ranked[:4]) < sum(kept[name] for name in ranked[-4:]) - 1
    assert max(kept.values()) == 1.0


def test_the_weight_is_by_the_sum_over_the_group(batches: Batches) -> None:
    model = small_cnn()
    ones = lambda group: torch.ones(len(group[0].idxs))  # noqa: E731
    importance = MRSImportance(model, batches, torchattacks.FGSM, base=ones, alpha=2.0)
    graph = tp.DependencyGraph().build_dependency(model, EXAMPLE)
    scores = [
        float(importance(graph.get_pruning_group(model[i], tp.prune_conv_out_channels, [0, 1]))[0])  # type: ignore[index]
        for i in (0, 3)
    ]
    modules = importance.measurement().modules
    expected = ((modules["0"] + modules["3"]) / (modules["3"] + modules["7"])) ** 2
    assert scores[0] / scores[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("base", ["taylor", "magnitude", tp.importance.TaylorImportance(multivariable=True)])
def test_scoring_leaves_no_trace(base: Any, batches: Batches) -> None:
    model = small_cnn()
    graph = tp.DependencyGraph().build_dependency(model, EXAMPLE)
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [5, 1, 3])
    indices = [(list(item.idxs), list(item.root_idxs)) for item in group]
    importance = MRSImportance(model, batches, torchattacks.CW(model, steps=2), base=base)
    with unchanged(model), torch.no_grad():
        scores = importance(group)
        assert not torch.is_grad_enabled()
    assert scores is not None
    whole = importance(graph.get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(8))))  # type: ignore[index]
    assert whole is not None
    if base == "taylor":  # what is left is the normaliser, the mean over the group's channels
        torch.testing.assert_close(scores / scores.mean(), whole[[5, 1, 3]] / whole[[5, 1, 3]].mean())
    assert indices == [(list(item.idxs), list(item.root_idxs)) for item in group]


def test_measures_once_until_shapes_change(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    from tp_mrs import importance as module

    calls = []
    real = module.measure
    monkeypatch.setattr(module, "measure", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    model = small_resnet()
    importance = MRSImportance(model, batches, torchattacks.FGSM)
    assert not calls
    prune(model, importance, iterative_steps=3)
    assert len(calls) == 3
    first = importance.measurement()
    assert len(calls) == 4
    assert importance.measurement() is first


def test_attention_survives_iterative_steps() -> None:
    import timm

    model = timm.create_model("mobilevit_xxs", num_classes=4)
    example = torch.rand(2, 3, 64, 64)
    importance = MRSImportance(model, [(example, torch.tensor([0, 1]))], torchattacks.FGSM)
    pruner = tp.pruner.BasePruner(
        model, example, importance=importance, global_pruning=True, iterative_steps=2, **pruner_kwargs(model)
    )
    pruner.step()
    pruner.step()
    assert refresh(model)(example).shape == (2, 4)


def test_two_pruners_do_not_share_their_dictionaries() -> None:
    model, other = small_cnn(), small_cnn()
    first, second = pruner_kwargs(model), pruner_kwargs(other)
    for name in ("num_heads", "in_channel_groups", "out_channel_groups"):
        assert first[name] is not second[name]
        assert first[name] is not pruner_kwargs(model)[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, "alpha: expected a number >= 0"),
        ({"base": "l7"}, "base: expected one of taylor, magnitude"),
        ({"epsilon": "big"}, "epsilon"),
        ({"estimator": "sam"}, "estimator"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, cnn: nn.Module, batches: Batches) -> None:
    with pytest.raises(InputError, match=message):
        MRSImportance(cnn, batches, torchattacks.FGSM, **arguments)


def test_data_must_be_readable_again(cnn: nn.Module, batches: Batches) -> None:
    with pytest.raises(InputError, match="data: expected something that can be read again"):
        MRSImportance(cnn, iter(batches), torchattacks.FGSM)


def test_a_pruner_on_another_model(cnn: nn.Module, batches: Batches) -> None:
    importance = MRSImportance(small_cnn(), batches, torchattacks.FGSM, base="magnitude")
    with pytest.raises(InputError, match="model: the pruner prunes another model"):
        prune(cnn, importance)
