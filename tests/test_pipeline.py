"""mrpf, from measuring to the report."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchattacks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import Batches, image_batches, small_cnn, small_resnet, unchanged
from tp_mrs import InputError, MRSImportance, Report, create_model, mrpf
from tp_mrs.allocation import Planner, amount
from tp_mrs.checkpoints import Checkpoint
from tp_mrs.pruning import prunable_groups
from tp_mrs.steps import Pruning, Step

EXAMPLE = torch.rand(1, 3, 32, 32)


def two_layers(first: int, second: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, first, 3),
        nn.ReLU(),
        nn.Conv2d(first, second, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(second, 4),
    )


def ascending(group: Any) -> torch.Tensor:
    return torch.arange(len(group[0].idxs))


def descending(group: Any) -> torch.Tensor:
    return -ascending(group)


@pytest.mark.parametrize(("budget", "rounds"), [({"macs": 0.5}, 1), ({"params": 0.4}, 2), ({"channels": 0.6}, 2)])
def test_the_budget_is_met_after_the_last_round(budget: Any, rounds: int, batches: Batches, tmp_path: Path) -> None:
    model = small_resnet()
    measure, target = next(iter(budget.items()))
    dense = amount(model, EXAMPLE, measure)
    model.eval()
    model.get_submodule("bn1").train()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    report = mrpf(
        model,
        EXAMPLE,
        batches,
        torchattacks.FGSM(model),
        **budget,
        rounds=rounds,
        test_data=batches,
        attacks=["fgsm"],
        objective="fgsm",
        lr=0.01,
    )
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert amount(model, EXAMPLE, measure) / dense == pytest.approx(target, rel=0.01)
    assert [r.target for r in report.rounds] == pytest.approx([target ** ((i + 1) / rounds) for i in range(rounds)])
    assert report.rounds[-1].reached == pytest.approx(target, rel=0.01)
    assert report.before is not None
    assert report.after is not None
    assert report.before.macs > report.after.macs
    assert set(report.rounds[0].ratios) == set(report.rounds[0].sensitivity.groups)
    modules: Any = dict(model.named_modules())
    assert {name: modules[name].out_channels for name in report.widths} == {n: w[1] for n, w in report.widths.items()}
    assert report.widths["conv1"][0] == 64
    assert list(report.widths) == [name for name, _ in model.named_modules() if name in report.widths]
    assert json.loads(report.save(tmp_path / "r.json").read_text())["settings"]["budget"] == measure
    assert "fine-tuned" in str(report)
    assert len(report.plot().axes) == 3


def test_without_fine_tuning_or_test_data(batches: Batches) -> None:
    model = small_cnn()
    report = mrpf(model, EXAMPLE, batches, torchattacks.FGSM, macs=0.48, epochs=0)
    assert (report.before, report.after, report.rounds[0].finetuning) == (None, None, None)
    assert model(EXAMPLE).shape == (1, 4)


@pytest.mark.parametrize("steps", [1, 3])
def test_each_step_goes_by_its_own_measurement(steps: int, batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    measure = MRSImportance.measurement

    def noted(self: MRSImportance) -> Any:
        width = len(self.model.get_parameter("conv1.weight"))
        if width not in widths:
            widths.append(width)
        return measure(self)

    monkeypatch.setattr(MRSImportance, "measurement", noted)
    model = small_resnet()
    report = mrpf(model, EXAMPLE, batches, torchattacks.FGSM, macs=0.3, iterative_steps=steps, epochs=0)
    assert len(widths) == steps
    assert widths == sorted(widths, reverse=True)
    (done,) = report.rounds
    before, after = done.widths["conv1"]
    assert (before, after) == (64, len(model.get_parameter("conv1.weight")))
    assert done.ratios["conv1"] == pytest.approx(1 - after / before)
    assert done.sensitivity.sizes["conv1"] == 64 * 3 * 49  # of the dense model, all the same
    assert report.settings["iterative_steps"] == steps


def test_in_rounds_min_keep_is_of_the_dense_model(batches: Batches) -> None:
    arguments: dict[str, Any] = {"alpha": 3.0, "min_keep": 0.25, "rounds": 2, "epochs": 0}
    report = mrpf(small_resnet(), EXAMPLE, batches, torchattacks.FGSM, macs=0.3, **arguments)
    assert min(after / before for before, after in report.widths.values()) >= 0.25
    model = small_resnet()
    with unchanged(model), pytest.raises(InputError, match=r"macs=0.1: can't be met .* or lower min_keep"):
        mrpf(model, EXAMPLE, batches, torchattacks.FGSM, macs=0.1, **arguments)


def test_with_few_channels_the_plan_of_the_first_step_holds(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later steps find no plan of their own here."""
    nearest, asked = Planner.nearest, 0

    def short(self: Planner, *arguments: Any) -> tuple[dict[str, int], float]:
        nonlocal asked
        asked += 1
        kept, left = nearest(self, *arguments)
        return (kept, left) if asked == 1 else ({group.name: group.units for group in self.groups}, 1.0)

    monkeypatch.setattr(Planner, "nearest", short)
    report = mrpf(small_cnn(), EXAMPLE, batches, torchattacks.FGSM, macs=0.48, iterative_steps=4, epochs=0)
    assert asked == 4
    assert report.rounds[0].reached == pytest.approx(0.48, rel=0.01)


def test_only_the_last_round_must_meet_its_budget(batches: Batches) -> None:
    torch.manual_seed(0)
    report = mrpf(two_layers(8, 16), EXAMPLE, batches, torchattacks.FGSM, macs=0.25, rounds=2, epochs=0)
    assert [done.target for done in report.rounds] == [0.5, 0.25]
    assert abs(report.rounds[0].reached - 0.5) > 0.005  # no whole channels come nearer
    assert report.rounds[1].reached == pytest.approx(0.25, rel=0.01)


def test_a_budget_between_whole_channels_is_refused_as_given(batches: Batches) -> None:
    model = two_layers(8, 9)
    with unchanged(model), pytest.raises(InputError, match=r"channels=0.38: can't be met within 1%; the nearest is"):
        mrpf(model, EXAMPLE, batches, torchattacks.FGSM, channels=0.38, rounds=2)


def test_a_group_that_is_down_to_one_channel_still_counts(batches: Batches) -> None:
    """To Torch-Pruning it is no group any more."""
    model, dense = two_layers(1, 8), prunable_groups(two_layers(4, 8), EXAMPLE)
    final = {"0": 1, "2": 4}
    before = Step(9, final, final, units={"0": 1, "2": 8}, kept={}, widths={}, reached=9, sensitivity={})
    pruning = Pruning(
        model=model,
        example_inputs=EXAMPLE,
        importance=partial(MRSImportance, model, batches, torchattacks.FGSM, progress=False),
        settle=lambda: model,
        compensate=False,
        source="train_data",
        dense=dense,
        measure="channels",
        target=5,
        alpha=0.5,
        min_keep=0.1,
        round_to=None,
        ignored=[],
        seed=0,
    )
    step = pruning.step(goal=5, part=1.0, before=before)
    assert (step.kept, step.units, step.reached) == ({"2": 0.5}, final, 5)


def test_several_rounds_meet_the_budget_in_coarse_multiples(batches: Batches) -> None:
    """Rounds that go their own ways would end where multiples of 16 leave no way to it."""
    torch.manual_seed(0)
    model = create_model("resnet10t", num_classes=4, image_size=16, channels=[32, 64, 96, 128])
    settings: dict[str, Any] = {"rounds": 3, "iterative_steps": 2, "round_to": 16, "epochs": 0}
    for target in (0.5, 0.4):
        report = mrpf(copy.deepcopy(model), EXAMPLE, batches, torchattacks.FGSM, macs=target, **settings)
        assert report.rounds[-1].reached == pytest.approx(target, rel=0.01)


class Grouped(nn.Sequential):
    """A convolution of 8 groups of 4 channels between others."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, groups=8),
            nn.ReLU(),
            nn.Conv2d(32, 24, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 4),
        )


def test_groups_of_convolutions_keep_their_last_channels_in_later_rounds(batches: Batches) -> None:
    """With one channel each they look like a depthwise convolution, whose channels could go one by one."""
    torch.manual_seed(0)
    model = Grouped()
    report = mrpf(model, EXAMPLE, batches, torchattacks.FGSM, channels=10 / 32, rounds=3, alpha=2.0, epochs=0)
    widths = {name: module.out_channels for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert {name: after for name, (_, after) in report.widths.items()} == widths
    assert min(widths["0"], widths["2"]) >= 8
    units = widths["0"] // 8 + widths["2"] // 8 + widths["4"]
    assert report.rounds[-1].reached == units / 32 == 10 / 32


def test_later_rounds_have_nothing_left_to_do(batches: Batches) -> None:
    """The only group is down to one channel after the first."""
    classifier = nn.Conv2d(2, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), *classifier)
    report = mrpf(model, EXAMPLE, batches, torchattacks.FGSM, channels=0.5, rounds=2, iterative_steps=2, epochs=0)
    assert [dict(each.ratios) for each in report.rounds] == [{"0": 0.5}, {}]
    assert report.widths == {"0": (2, 1)}
    assert report.rounds[-1].reached == 0.5


def test_the_report_has_the_last_widths_of_what_dropped_out() -> None:
    widths: list[dict[str, tuple[int, int]]] = [{"a": (4, 3), "b": (8, 6)}, {"a": (3, 1), "b": (6, 5)}, {"b": (5, 4)}]
    rounds: Any = tuple(SimpleNamespace(widths=each) for each in widths)
    assert Report(None, None, rounds, {}).widths == {"a": (4, 1), "b": (8, 4)}


def test_ignored_layers_keep_their_outputs(batches: Batches) -> None:
    model = small_resnet()
    block = model.get_submodule("layer3")
    spared = {name: module.out_channels for name, module in block.named_modules() if isinstance(module, nn.Conv2d)}
    report = mrpf(model, EXAMPLE, batches, torchattacks.FGSM, macs=0.5, ignored_layers=[block], epochs=0)
    assert report.rounds[0].reached == pytest.approx(0.5, rel=0.01)
    assert {name: block.get_submodule(name).out_channels for name in spared} == spared
    assert "layer3" in report.settings["ignored_layers"]


def test_a_budget_of_channels_is_of_those_that_are_not_ignored(batches: Batches) -> None:
    model = two_layers(8, 12)
    report = mrpf(model, EXAMPLE, batches, torchattacks.FGSM, channels=0.5, ignored_layers=[model[0]], epochs=0)
    assert report.widths == {"2": (12, 6)}
    assert report.rounds[0].reached == 0.5


def test_nothing_to_prune_leaves_the_model_as_it_is(batches: Batches, caplog: pytest.LogCaptureFixture) -> None:
    model = small_resnet()
    with unchanged(model):
        report = mrpf(model, EXAMPLE, batches, torchattacks.FGSM, macs=1.0, epochs=0)
    assert set(report.rounds[0].ratios.values()) == {0.0}
    assert not caplog.records


def test_steps_keep_multiples(batches: Batches) -> None:
    report = mrpf(small_resnet(), EXAMPLE, batches, torchattacks.FGSM, macs=0.4, round_to=4, epochs=0)
    assert all(after % 4 == 0 for _, after in report.widths.values())
    assert any(after < before for before, after in report.widths.values())


@pytest.mark.parametrize(
    ("base", "other"),
    [
        (tp.importance.MagnitudeImportance(p=2), tp.importance.MagnitudeImportance(p=1)),
        (ascending, descending),
    ],
)
def test_a_checkpoint_belongs_to_one_base(base: Any, other: Any, batches: Batches, tmp_path: Path) -> None:
    dense = small_cnn()
    arguments: dict[str, Any] = {"macs": 0.48, "epochs": 0, "checkpoint": tmp_path / "run"}
    mrpf(copy.deepcopy(dense), EXAMPLE, batches, torchattacks.FGSM, base=base, **arguments)
    mrpf(copy.deepcopy(dense), EXAMPLE, batches, torchattacks.FGSM, base=base, **arguments)
    with pytest.raises(InputError, match=r"checkpoint: .* of another run"):
        mrpf(copy.deepcopy(dense), EXAMPLE, batches, torchattacks.FGSM, base=other, **arguments)


def test_a_base_that_draws_goes_by_the_seed(batches: Batches) -> None:
    dense, outputs = small_cnn(), []
    for _ in range(2):
        model = copy.deepcopy(dense)
        state = torch.get_rng_state()
        mrpf(model, EXAMPLE, batches, torchattacks.FGSM, macs=0.48, epochs=0, base=tp.importance.RandomImportance())
        assert torch.equal(torch.get_rng_state(), state)
        outputs.append(model.eval()(EXAMPLE))
    assert torch.equal(*outputs)


def test_frozen_layers_stay_frozen(batches: Batches) -> None:
    model = small_cnn()
    frozen = {name for name, _ in model.named_parameters() if name in ("0.weight", "3.weight")}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    widths = {name: len(parameter) for name, parameter in model.named_parameters()}
    mrpf(model, EXAMPLE, batches, torchattacks.FGSM, macs=0.48, epochs=0)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    assert min(len(model.get_parameter(name)) - widths[name] for name in frozen) < 0


def test_layers_make_up_for_what_goes_unless_told_otherwise(batches: Batches) -> None:
    dense, outputs = small_cnn(), {}
    for options in ({}, {"compensate": True}, {"compensate": False}):
        model = copy.deepcopy(dense)
        report = mrpf(model, EXAMPLE, batches, torchattacks.FGSM, macs=0.48, epochs=0, **options)  # type: ignore[arg-type]
        outputs[report.settings["compensate"], len(options)] = model.eval()(EXAMPLE)
    assert torch.equal(outputs[True, 0], outputs[True, 1])
    assert not torch.allclose(outputs[True, 1], outputs[False, 1])


def test_variances_stay_where_layers_make_up_for_what_goes(batches: Batches) -> None:
    dense: Any = small_cnn()
    dense[1].running_var.uniform_(0.5, 2)
    for compensate in (True, False):
        model: Any = copy.deepcopy(dense)
        mrpf(model, EXAMPLE, batches, torchattacks.FGSM, macs=0.48, epochs=0, compensate=compensate)
        assert 0 < len(model[1].running_var) < len(dense[1].running_var)
        assert torch.isin(model[1].running_var, dense[1].running_var).all() == compensate
        assert not torch.isin(model[1].running_mean, dense[1].running_mean).any()


def test_a_base_without_scores_for_a_group_prunes_nothing(batches: Batches) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 900, 4))
    before = copy.deepcopy(model.state_dict())
    bare = tp.importance.BNScaleImportance()
    with pytest.raises(InputError, match="base: it gives no scores for the group of 0, which is to be"):
        mrpf(model, EXAMPLE, batches, torchattacks.FGSM, macs=0.5, base=bare, epochs=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_same_seed_same_model(batches: Batches) -> None:
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = small_cnn()
        mrpf(model, EXAMPLE, batches, torchattacks.PGD, macs=0.48, seed=3)
        outputs.append(model.eval()(EXAMPLE))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"macs": 1.2}, "macs: expected"),
        ({"macs": 0.5, "params": 0.5}, "give exactly one budget"),
        ({"macs": 0.5, "rounds": 0}, "rounds"),
        ({"macs": 0.5, "iterative_steps": 0}, "iterative_steps: expected an integer >= 1"),
        ({"macs": 0.5, "epochs": -1}, "epochs"),
        ({"macs": 0.5, "alpha": -1}, "alpha"),
        ({"macs": 0.5, "compensate": "no"}, "compensate: expected True or False, got 'no'"),
        ({"macs": 0.5, "attack": lambda: None}, "attack: .* can't be called with the model"),
        ({"macs": 0.5, "min_keep": 2}, "min_keep"),
        ({"macs": 0.5, "objective": "pdg"}, "objective: expected one of"),
        ({"macs": 0.5, "learning_rate": 0.1}, "training arguments: .*learning_rate"),
        ({"macs": 0.5, "train_attack": "pdg"}, "train_attack: no torchattacks attack is called 'pdg'"),
        ({"macs": 0.5, "checkpoint": 3}, "checkpoint: expected a path"),
        ({"macs": 0.5, "log": 3}, "log: expected a path"),
        ({"macs": 0.5, "log": "/"}, "log: / is a folder"),
        ({"macs": 0.5, "attacks": ["pdg"], "test_data": []}, "attacks: no torchattacks attack is called 'pdg'"),
        ({"macs": 0.5, "test_data": [], "attacks": []}, "test_data: it yielded no batch"),
        ({"macs": 0.5, "test_data": iter([]), "attacks": []}, "test_data: expected .* that can be read again"),
        ({"macs": 0.5, "calibration_data": []}, "calibration_data: it yielded no batch"),
        ({"macs": 0.5, "base": "l7"}, "base"),
        ({"macs": 0.5, "attack": torchattacks.FGSM(small_cnn())}, "attack: this FGSM is bound to another model"),
        (
            {"macs": 0.001, "test_data": []},
            "macs=0.001: can't be met within 1%; the nearest is macs=0.0.*lower min_keep$",
        ),
        ({"macs": 0.1, "round_to": 12, "test_data": []}, "the nearest is macs=1.0000, or lower min_keep or round_to"),
        ({"macs": 0.5, "objective": F.cross_entropy}, "objective: expected a function"),
        ({"macs": 0.5, "objective": lambda model, images, labels, attack: model(images)}, "objective: expected it to"),
        (
            {"macs": 0.5, "train_attack": "apgdt-1"},
            "train_attack: this APGDT was made for 10 classes, but the model has 4",
        ),
        ({"macs": 0.5, "train_data": [(EXAMPLE + 1, torch.tensor([0]))]}, "train_data: images: expected values in"),
        ({"macs": 0.5, "train_data": [(EXAMPLE, torch.tensor([4]))]}, "train_data: labels: expected classes 0 to 3"),
        ({"macs": 0.5, "train_data": [EXAMPLE]}, "train_data: expected batches of"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], message: str, batches: Batches) -> None:
    model = small_cnn()
    defaults = {"attack": torchattacks.FGSM, "train_data": batches, "calibration_data": batches}
    with unchanged(model), pytest.raises(InputError, match=message):
        mrpf(model, EXAMPLE, **{**defaults, **arguments})


class StopError(Exception):
    pass


def prune(
    folder: Path | None, monkeypatch: pytest.MonkeyPatch, *, stop: int = 0
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Two rounds from the same start; stops when a file has been written for the so many-th time."""
    write, written = Checkpoint.write, iter(range(1, 1000))

    def stops(self: Checkpoint, state: Any) -> None:
        write(self, state)
        if next(written) == stop:
            raise StopError

    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(192, 4)),
    )
    images, labels = (torch.cat(part) for part in zip(*image_batches(4, size=3, side=12), strict=True))
    data = DataLoader(TensorDataset(images, labels), 3, shuffle=True, generator=torch.Generator().manual_seed(1))
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "write", stops)
        report = mrpf(
            model,
            torch.rand(1, 3, 12, 12),
            data,
            torchattacks.FGSM(model),
            macs=0.4,
            rounds=2,
            calibration_data=data,
            test_data=image_batches(1, side=12),
            attacks=["fgsm"],
            objective="fgsm",
            checkpoint=folder,
            checkpoint_every=2,
            progress=False,
        )
    return report, model.state_dict()


def without_times(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: without_times(each) for key, each in content.items() if key not in ("latency_ms", "seconds")}
    return [without_times(each) for each in content] if isinstance(content, list | tuple) else content


def test_an_interrupted_job_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, weights = prune(None, monkeypatch)
    folder = tmp_path / "job"
    for stop in (3, 1, 2, 1, 2, 3):  # in the first round, between its steps, between the rounds, and in the second
        with pytest.raises(StopError):
            prune(folder, monkeypatch, stop=stop)
    for _ in range(2):  # the second time everything is done already
        report, found = prune(folder, monkeypatch)
        assert without_times(report.to_dict()) == without_times(expected.to_dict())
        assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_the_folder_of_another_job(batches: Batches, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"epochs": 0, "checkpoint": tmp_path / "job"}
    start = small_cnn()
    mrpf(copy.deepcopy(start), EXAMPLE, batches, torchattacks.FGSM, macs=0.48, **arguments)
    again = copy.deepcopy(start)
    differences = {"target is 0.48 there, 0.5 here": {"macs": 0.5}, "lr is missing there, 0.1": {"lr": 0.1}}
    for message, other in differences.items():
        with unchanged(again), pytest.raises(InputError, match=f"checkpoint: .*another run: {message}"):
            mrpf(again, EXAMPLE, batches, torchattacks.FGSM, **{"macs": 0.48, **arguments, **other})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with unchanged(again), pytest.raises(InputError, match=r"checkpoint: .* holds other files"):
        mrpf(again, EXAMPLE, batches, torchattacks.FGSM, macs=0.48, **{**arguments, "checkpoint": tmp_path / "other"})
    (tmp_path / "job" / "job.safetensors").unlink()
    with unchanged(again), pytest.raises(InputError, match=r"checkpoint: .* holds other files"):
        mrpf(again, EXAMPLE, batches, torchattacks.FGSM, macs=0.48, **arguments)


def test_the_folder_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Round:
        reached: float

    with monkeypatch.context() as earlier:
        earlier.setattr("tp_mrs.pipeline.Round", Round)
        with pytest.raises(StopError):
            prune(tmp_path / "job", monkeypatch, stop=3)
    message = r"another run: what Round holds is \['reached'\] there, .*; choose another path, or delete it"
    with pytest.raises(InputError, match=f"checkpoint: .*{message}"):
        prune(tmp_path / "job", monkeypatch)


def test_a_bad_batch_loses_no_work(batches: Batches, tmp_path: Path) -> None:
    bad = [*batches, (batches[0][0] + 1, batches[0][1])]
    start = small_cnn()
    arguments: dict[str, Any] = {"macs": 0.48, "calibration_data": batches, "checkpoint": tmp_path / "job"}
    with pytest.raises(InputError, match="images: expected values in"):
        mrpf(copy.deepcopy(start), EXAMPLE, bad, torchattacks.FGSM, **arguments)
    good = [*batches, batches[0]]
    models = [copy.deepcopy(start) for _ in range(2)]
    mrpf(models[0], EXAMPLE, good, torchattacks.FGSM, **arguments)
    mrpf(models[1], EXAMPLE, good, torchattacks.FGSM, **{**arguments, "checkpoint": None})
    assert torch.equal(*(model.eval()(EXAMPLE) for model in models))
