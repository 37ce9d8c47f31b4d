"""MRSImportance inside Torch-Pruning's own pruners."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchattacks
from torch import Tensor, nn

from tests.conftest import Batches, randomised, small_cnn, small_resnet, unchanged
from tp_mrs import InputError, MRSImportance, allocate, measure_sensitivity, pruner_kwargs, refresh
from tp_mrs.allocation import amount
from tp_mrs.counting import count
from tp_mrs.importance import sorted_copy
from tp_mrs.pruning import build_pruner, rooted_groups

EXAMPLE = torch.rand(1, 3, 32, 32)


def prune(model: nn.Module, importance: Any, **arguments: Any) -> list[Any]:
    options = {"global_pruning": True, "pruning_ratio": 0.5} | arguments
    pruner = tp.pruner.BasePruner(model, EXAMPLE, importance=importance, **options, **pruner_kwargs(model))
    for _ in range(options.get("iterative_steps", 1)):
        pruner.step()
    return pruner.pruning_history()


def widths(model: nn.Module) -> dict[str, int]:
    return {name: module.out_channels for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


@pytest.mark.parametrize("name", ["magnitude", "fpgm", "lamp", "bn_scale"])
def test_by_one_ratio_the_base_decides(name: str, batches: Batches) -> None:
    base: Any = {
        "magnitude": tp.importance.MagnitudeImportance,
        "fpgm": tp.importance.FPGMImportance,
        "lamp": tp.importance.LAMPImportance,
        "bn_scale": tp.importance.BNScaleImportance,
    }[name]
    ours = small_resnet()
    theirs = copy.deepcopy(ours)
    importance = MRSImportance(ours, batches, torchattacks.FGSM, base=base())
    history = prune(ours, importance, global_pruning=False)
    assert history == prune(theirs, base(), global_pruning=False)
    assert widths(ours) != widths(small_resnet())
    assert torch.equal(ours(EXAMPLE), theirs(EXAMPLE))


def test_the_base_taylor_is_torch_prunings_on_the_adversarial_loss(batches: Batches) -> None:
    model = small_resnet().eval()
    importance = MRSImportance(model, batches, torchattacks.FGSM, base="taylor")
    attack, slow = torchattacks.FGSM(model), tp.importance.TaylorImportance()
    for images, labels in batches:
        (F.cross_entropy(model(attack(images, labels)), labels, reduction="sum") / 12).backward()
    groups = [group.raw for group in rooted_groups(build_pruner(model, EXAMPLE))]
    for group in groups:
        ours, theirs = importance(group), slow(sorted_copy(group))
        assert ours is not None
        assert theirs is not None
        ascending = theirs[ours.argsort()]
        assert (ascending.diff() >= -1e-5 * theirs.max()).all()


def test_alpha_zero_takes_the_same_fraction_of_all_groups(batches: Batches) -> None:
    model = small_resnet()
    before = widths(model)
    prune(model, MRSImportance(model, batches, torchattacks.FGSM, alpha=0.0), pruning_ratio=0.5)
    for name, width in widths(model).items():
        assert abs(width - before[name] / 2) <= 1


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_global_pruning_takes_of_each_group_what_allocate_does(alpha: float, batches: Batches) -> None:
    model = small_resnet()
    dense, before = copy.deepcopy(model), widths(model)
    prune(model, MRSImportance(model, batches, torchattacks.FGSM, alpha=alpha), pruning_ratio=0.4)
    reached = amount(model, EXAMPLE, "macs") / amount(dense, EXAMPLE, "macs")
    sensitivity = measure_sensitivity(dense, batches, torchattacks.FGSM, example_inputs=EXAMPLE)
    ratios = allocate(dense, EXAMPLE, sensitivity, macs=reached, alpha=alpha)
    kept = widths(model)
    assert len({kept[name] / before[name] for name in kept}) > 4
    names = {module: name for name, module in dense.named_modules()}
    for layer, ratio in ratios.items():
        name = names[layer]
        assert abs(kept[name] - before[name] * (1 - ratio)) <= 2.1  # allocate also gives back what rounding took


def test_scores_by_hand(batches: Batches) -> None:
    """3×3 convolutions of 3 → 8 → 12 channels on 32×32 pixels, a linear layer of 12·4 → 4, all with biases; a norm."""
    model: Any = small_cnn()
    importance = MRSImportance(model, batches, torchattacks.FGSM, base="magnitude", alpha=0.7, min_keep=0.0)
    graph = tp.DependencyGraph().build_dependency(model, EXAMPLE)
    first, second, third = 8 * (9 * 3 + 1 + 2) * 1024, 12 * (9 * 8 + 1) * 1024, 4 * (12 * 4 + 1)
    units = importance.sensitivity(EXAMPLE).units
    base = tp.importance.MagnitudeImportance()
    for root, channels, saved in ((0, 8, (first + second) / 8), (3, 12, (second + third) / 12)):
        group = graph.get_pruning_group(model[root], tp.prune_conv_out_channels, list(range(channels)))
        total = count(model, EXAMPLE).macs
        losses = [sensitivity**2 for sensitivity in sorted(units[str(root)])]
        q, least = [k / channels for k in range(1, channels + 1)], min(loss for loss in losses if loss > 0)
        expected = [
            each * ((loss + 1e-6 * least * each) / (each * saved / total)) ** 0.7
            for each, loss in zip(q, losses, strict=True)
        ]
        found = importance(group)
        assert found is not None
        ranked = found[base(group).argsort()].tolist()
        assert ranked[:-1] == pytest.approx(expected[:-1], rel=1e-3)
        assert ranked[-1] > 1e6 * max(expected)  # one channel stays


def test_channels_that_do_nothing_go_first(batches: Batches) -> None:
    """Where a residual block ends in zeros, as timm's untrained ones do, Torch-Pruning's Taylor scores are 0/0."""
    model: Any = small_resnet()
    for name, module in model.named_modules():
        if name.endswith("bn2"):
            nn.init.zeros_(module.weight)
    before = widths(model)
    importance = MRSImportance(model, batches, torchattacks.FGSM)
    units = importance.sensitivity(EXAMPLE).units
    prune(model, importance, pruning_ratio=0.3)
    removed = {name: before[name] - width for name, width in widths(model).items()}
    assert removed["layer1.0.conv1"] == 7  # all of a group but one
    assert abs(sum(removed[name] for name in units) - 0.3 * sum(map(len, units.values()))) <= 1
    for name, found in units.items():
        assert removed[name] <= sum(unit == 0 for unit in found)


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
    assert sorted(kept.values())[:2] == pytest.approx([0.125] * 2, abs=0.075)


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
    rest = bases[ranked.indices[kept:]].tolist()  # in the base's order
    assert rest == sorted(rest, reverse=True)


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


@pytest.mark.parametrize("base", ["sensitivity", "taylor"])
def test_some_channels_of_a_group_rank_as_they_do_among_all(base: Any, batches: Batches) -> None:
    model: Any = small_cnn()
    graph = tp.DependencyGraph().build_dependency(model, EXAMPLE)
    importance = MRSImportance(model, batches, torchattacks.FGSM, base=base)
    some, all_of_them = (
        importance(graph.get_pruning_group(model[0], tp.prune_conv_out_channels, list(indices)))
        for indices in ([5, 1, 3], range(8))
    )
    assert some is not None
    assert all_of_them is not None
    assert some.argsort().tolist() == all_of_them[[5, 1, 3]].argsort().tolist()


GROUPED: dict[str, dict[str, Any]] = {
    "regnetx_002": {},  # grouped convolutions
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},  # heads
    "mobilevit_xxs": {},
}


@pytest.mark.parametrize("name", GROUPED)
def test_channels_that_go_together_count_as_one(name: str, batches: Batches) -> None:
    """By one ratio the base alone decides, and by global pruning no more is kept than by allocate."""
    model = randomised(timm.create_model(name, num_classes=4, **GROUPED[name])).eval()
    base = tp.importance.MagnitudeImportance()
    importance = MRSImportance(model, batches, torchattacks.FGSM, base=base)
    for repeated in filter(lambda rooted: rooted.repeats > 1, rooted_groups(build_pruner(model, EXAMPLE))):
        ours, theirs = importance(repeated.raw), base(sorted_copy(repeated.raw))
        assert ours is not None
        assert theirs is not None
        ours, theirs = (scores.view(repeated.repeats, -1).mean(dim=0) for scores in (ours, theirs))
        assert (theirs[ours.argsort()].diff() >= -1e-5 * theirs.max()).all()
    dense = copy.deepcopy(model)
    importance = MRSImportance(model, batches, torchattacks.FGSM)
    prune(model, importance, pruning_ratio=0.4)
    reached = amount(refresh(model), EXAMPLE, "macs") / amount(dense, EXAMPLE, "macs")
    sensitivity = measure_sensitivity(dense, batches, torchattacks.FGSM, example_inputs=EXAMPLE)
    ratios = allocate(dense, EXAMPLE, sensitivity, macs=reached)
    names = {module: name for name, module in dense.named_modules()}
    apart = {}
    for layer, ratio in ratios.items():
        before, after = (of.get_parameter(f"{names[layer]}.weight").shape[0] for of in (dense, model))
        apart[names[layer]] = abs(after / before - (1 - ratio))
    assert sorted(apart.values())[len(apart) // 2] < 0.06, apart
    assert sorted(apart.values())[len(apart) * 9 // 10] < 0.15, apart


def test_the_cost_of_attention_is_counted(batches: Batches) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **GROUPED["vit_tiny_patch16_224"])
    importance = MRSImportance(model, batches, torchattacks.FGSM)
    assert importance._layout().macs["blocks.0.attn.qkv"] > 0.1
    assert sum(importance._layout().macs.values()) == pytest.approx(1, abs=0.02)


def test_in_double_precision(batches: Batches) -> None:
    model: Any = small_cnn().double()
    doubled = [(images.double(), labels) for images, labels in batches]
    group = tp.DependencyGraph().build_dependency(model, EXAMPLE.double())
    scores = MRSImportance(model, doubled, torchattacks.VANILA)(
        group.get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(8)))
    )
    assert scores is not None
    assert len(scores.unique()) == 8


def test_a_base_may_count(batches: Batches) -> None:
    model = small_cnn()
    importance = MRSImportance(model, batches, torchattacks.FGSM, base=lambda group: torch.arange(len(group[0].idxs)))
    before = widths(model)
    prune(model, importance, pruning_ratio=0.5)
    assert sum(widths(model).values()) < sum(before.values())


def test_beyond_min_keep_all_groups_lose_alike(batches: Batches) -> None:
    model = small_resnet()
    before = widths(model)
    prune(model, MRSImportance(model, batches, torchattacks.FGSM, min_keep=0.5), pruning_ratio=0.7)
    kept = {name: width / before[name] for name, width in widths(model).items()}
    assert max(kept.values()) < 0.5


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


@pytest.mark.parametrize("parameters", [1, 12])
def test_prelus_go_with_their_channels(parameters: int, batches: Batches) -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 12, 3), nn.PReLU(parameters), nn.Conv2d(12, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*parts, nn.Linear(8, 4)).eval()
    importance = MRSImportance(model, batches, torchattacks.FGSM, progress=False)
    example = torch.zeros(1, 3, 16, 16)
    pruner = build_pruner(model, example, importance, global_pruning=True, pruning_ratio=0.5)
    pruner.step()
    assert model(example).shape == (1, 4)
    assert sum(module.out_channels for module in model if isinstance(module, nn.Conv2d)) == 10
