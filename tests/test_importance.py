"""MRSImportance inside Torch-Pruning's own pruners."""

from __future__ import annotations

import copy
import math
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
    importance = MRSImportance(model, batches, torchattacks.FGSM, base=Ramp(), alpha=2.0)
    groups = importance.sensitivity(EXAMPLE).typical
    before = widths(model)
    prune(model, importance, pruning_ratio=0.4)
    kept = {name: widths(model)[name] / before[name] for name in groups}
    ranked = sorted(groups, key=groups.__getitem__)
    assert sum(kept[name] for name in ranked[:4]) < sum(kept[name] for name in ranked[-4:]) - 1
    assert max(kept.values()) == 1.0


def test_the_weight_is_by_all_layers_of_the_group(batches: Batches) -> None:
    model: Any = small_cnn()
    importance = MRSImportance(
        model, batches, torchattacks.FGSM, base=lambda group: torch.ones(len(group[0].idxs)), alpha=2.0, min_keep=0.0
    )
    graph = tp.DependencyGraph().build_dependency(model, EXAMPLE)
    groups = [graph.get_pruning_group(model[i], tp.prune_conv_out_channels, [0, 1]) for i in (0, 3)]
    first, second = (scores.min().item() for group in groups if (scores := importance(group)) is not None)
    measured = importance.measurement()
    squares = {name: score**2 / measured.sizes[name] for name, score in measured.modules.items()}
    expected = (squares["0"] + squares["3"]) / (squares["3"] + squares["7"])  # the root, to the power of alpha
    assert first / second == pytest.approx(expected, rel=1e-5)


def test_groups_that_do_nothing_go_first(batches: Batches) -> None:
    """Where a residual block ends in zeros, as timm's untrained ones do, Torch-Pruning's Taylor scores are 0/0."""
    model: Any = small_resnet()
    for name, module in model.named_modules():
        if name.endswith("bn2"):
            nn.init.zeros_(module.weight)
    before = widths(model)
    prune(model, MRSImportance(model, batches, torchattacks.FGSM), pruning_ratio=0.3)
    kept = {name: width / before[name] for name, width in widths(model).items()}
    within = [kept[name] for name in kept if name.endswith(".conv1")]
    assert len(within) == 8
    assert max(within) < 0.3


@pytest.mark.parametrize(
    ("scores", "got"),
    [
        (torch.ones(1000), r"shape \(1000,\)"),
        (torch.ones(2, 2), r"shape \(2, 2\)"),
        ([1.0, 2.0], "list"),
        (tp.importance.MagnitudeImportance(), "MagnitudeImportance; pass an object"),
    ],
)
def test_a_base_that_does_not_score_each_channel(scores: Any, got: str, batches: Batches) -> None:
    model = small_cnn()
    importance = MRSImportance(model, batches, torchattacks.FGSM, base=lambda group: scores)
    with pytest.raises(InputError, match=f"^base: expected .* score for each of the group's .* channels.*got {got}"):
        prune(model, importance, pruning_ratio=0.3)


def test_a_base_that_scores_some_channels_nan(batches: Batches) -> None:
    model = small_cnn()
    importance = MRSImportance(model, batches, torchattacks.FGSM, base=lambda group: torch.tensor([1.0, math.nan]))
    graph = tp.DependencyGraph().build_dependency(model, EXAMPLE)
    group = graph.get_pruning_group(model.get_submodule("0"), tp.prune_conv_out_channels, [0, 1])
    with pytest.raises(InputError, match=r"^base: .* found NaN among them; correct the importance"):
        importance(group)


@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_no_group_is_emptied_or_spared(ratio: float, batches: Batches) -> None:
    model = small_resnet()
    before = widths(model)
    prune(model, MRSImportance(model, batches, torchattacks.FGSM, alpha=4.0), pruning_ratio=ratio)
    kept = {name: width / before[name] for name, width in widths(model).items()}
    assert min(kept.values()) >= 0.1
    assert sorted(kept.values())[:3] == pytest.approx([0.125] * 3, abs=0.075)


@pytest.mark.parametrize(
    ("scores", "options", "kept"),
    [
        ([1.0, 8, 2, 7, 3, 6, 4, 5], {"min_keep": 0.25}, 2),
        ([1.0, 8, 2, 7, 3, 6, 4, 5], {"min_keep": 0.3, "round_to": 2}, 4),
        ([1.0, 8, 2, 7, 3, 6, 4, 5], {"min_keep": 0.0, "round_to": 16}, 8),
        ([0.0, 1, 0, 0, 0, 0, 0, 0], {"min_keep": 0.5}, 4),
    ],
)
def test_so_many_channels_stand_above_those_of_every_group(
    scores: list[float], options: dict[str, Any], kept: int, batches: Batches
) -> None:
    """Even at an alpha that puts the groups many orders of magnitude apart, and where the base scores channels 0."""
    model: Any = small_cnn()
    graph = tp.DependencyGraph().build_dependency(model, EXAMPLE)
    sizes = ((model[0], 8), (model[3], 12))
    groups = [graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(size))) for layer, size in sizes]

    def base(group: Any) -> Tensor:
        return torch.tensor(scores) if len(group[0].idxs) == 8 else torch.full((12,), 9.0)

    settings: dict[str, Any] = {"base": base, "alpha": 6.0}
    found = MRSImportance(model, batches, torchattacks.FGSM, **settings, **options)(groups[0])
    other = MRSImportance(model, batches, torchattacks.FGSM, **settings)(groups[1])
    assert found is not None
    assert other is not None
    ranked, bases = found.sort(descending=True), torch.tensor(scores)
    assert bases[ranked.indices[:kept]].sum() == bases.topk(kept).values.sum()
    assert ranked.values[kept - 1] > 1e4 * other.min()
    rest = ranked.indices[kept:]  # in proportion to the base's
    torch.testing.assert_close(found[rest] * bases[rest].sum(), bases[rest] * found[rest].sum())


@pytest.mark.parametrize("base", ["taylor", "magnitude", tp.importance.TaylorImportance(multivariable=True)])
def test_scoring_leaves_no_trace(base: Any, batches: Batches) -> None:
    model: Any = small_cnn()
    graph = tp.DependencyGraph().build_dependency(model, EXAMPLE)
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [5, 1, 3])
    indices = [(list(item.idxs), list(item.root_idxs)) for item in group]
    importance = MRSImportance(model, batches, torchattacks.CW(model, steps=2), base=base)
    with unchanged(model), torch.no_grad():
        scores = importance(group)
        assert not torch.is_grad_enabled()
    assert scores is not None
    assert scores.shape == (3,)
    assert indices == [(list(item.idxs), list(item.root_idxs)) for item in group]


def test_some_channels_of_a_group_score_as_they_do_among_all(batches: Batches) -> None:
    model: Any = small_cnn()
    graph = tp.DependencyGraph().build_dependency(model, EXAMPLE)
    importance = MRSImportance(model, batches, torchattacks.FGSM, alpha=0.0)
    some, all_of_them = (
        importance(graph.get_pruning_group(model[0], tp.prune_conv_out_channels, list(indices)))
        for indices in ([5, 1, 3], range(8))
    )
    assert some is not None
    assert all_of_them is not None
    picked = all_of_them[[5, 1, 3]]  # the same, but for the division by the mean over the group
    torch.testing.assert_close(some / some.mean(), picked / picked.mean())


def test_measures_once_until_shapes_change(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    from tp_mrs import importance as module

    calls: list[int] = []
    real = module.measure

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "measure", counted)
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
        ({"round_to": 0}, "round_to: expected an integer >= 1"),
        ({"base": "l7"}, "base: expected one of sensitivity, taylor, magnitude"),
        ({"epsilon": "big"}, "epsilon"),
        ({"estimator": "sam"}, "estimator"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, cnn: nn.Module, batches: Batches) -> None:
    with pytest.raises(InputError, match=message):
        MRSImportance(cnn, batches, torchattacks.FGSM, **arguments)


def test_data_must_be_readable_again(cnn: nn.Module, batches: Batches) -> None:
    with pytest.raises(InputError, match=r"data: expected .* that can be read again"):
        MRSImportance(cnn, iter(batches), torchattacks.FGSM)


def test_a_pruner_on_another_model(cnn: nn.Module, batches: Batches) -> None:
    importance = MRSImportance(small_cnn(), batches, torchattacks.FGSM)
    with pytest.raises(InputError, match="model: the pruner prunes another model"):
        prune(cnn, importance)
