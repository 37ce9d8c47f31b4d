"""The benchmark of pruners: its contenders, its cells and its report."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from benchmarks import again, report, run
from benchmarks import contenders as roster
from benchmarks.contenders import CONTENDERS, MAIN, Budget, Regularised, Subject, allocated, plain
from benchmarks.networks import NETWORKS
from benchmarks.tiers import MORE, TIERS, WITH_AUTOATTACK, Part, Work, points_of
from tp_mrs.allocation import amount
from tp_mrs.data import load_data
from tp_mrs.errors import InputError
from tp_mrs.files import read_json, write_json
from tp_mrs.models import create_model
from tp_mrs.objectives import name_of, standard
from tp_mrs.pruning import build_pruner, prunable_groups, pruner_kwargs
from tp_mrs.recalibration import recalibrate

from .conftest import randomised

pytest.importorskip("sklearn")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    model = create_model("resnet10t", num_classes=10, in_chans=1, image_size=32, channels=[16, 20, 24, 32])
    return randomised(model).eval()


def untrained() -> Subject:
    """A small network, and few images."""
    return Subject(load_data("digits", None), "narrowest resnet18", 0, model=tiny(), images=32)


@pytest.fixture
def subject() -> Subject:
    return untrained()


# --- contenders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name in roster.OURS or "global" in name])
def test_a_contender_meets_the_budget_and_leaves_the_dense_network_alone(subject: Subject, name: str) -> None:
    before = copy.deepcopy(subject.model.state_dict())
    pruned = CONTENDERS[name](subject, Budget("macs", 0.5), 0)
    found = amount(pruned, subject.example, "macs") / amount(subject.model, subject.example, "macs")
    assert found == pytest.approx(0.5, abs=0.03)
    assert all(torch.equal(tensor, before[key]) for key, tensor in subject.model.state_dict().items())
    assert pruned(subject.example).shape == (1, 10)


def test_a_ratio_far_from_the_budget_is_none(subject: Subject) -> None:
    with pytest.raises(InputError, match=r"macs-0.1: no ratio comes within 10% of it; the nearest misses by \d+%"):
        CONTENDERS["L2, uniform"](subject, Budget("macs", 0.001), 0)


def test_regularising_pruners_are_left_out_where_their_strength_means_nothing(subject: Subject) -> None:
    with pytest.raises(InputError, match="optimizer: a regularising pruner's strength is that for SGD, not adamw"):
        CONTENDERS["GroupNormPruner"](subject, Budget("macs", 0.5), 0)


def test_mrpf_taken_apart_is_mrpf(subject: Subject) -> None:
    budget = Budget("macs", 0.5)
    apart = roster.allocated(roster.OWN, roster.sensitivity, compensate=True)(subject, budget)
    whole = CONTENDERS["mrpf, 1 step"](subject, budget, 0)
    for (name, ours), theirs in zip(apart.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize(
    ("name", "objective", "passes"), [("L2, uniform, MART", "mart", 3), ("mrpf, RSLAD", "rslad", 3 + 1 / 3)]
)
def test_another_objective_may_spend_no_more_passes(
    name: str, objective: str, passes: float, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(roster, "finetune", lambda *_, **arguments: told.update(arguments))
    CONTENDERS[name](subject, Budget("macs", 0.5), 2)
    assert name_of(told["objective"]).startswith(objective)
    assert told["attack"] == "ffgsm"
    assert told["epochs"] * passes == pytest.approx(2 * 2)  # fast adversarial training takes two passes


def test_squares_are_the_mean_over_images_of_squared_gradients(subject: Subject) -> None:
    model, (images, labels) = subject.model, subject.calibration[0]
    name, weight = next((name, p) for name, p in model.named_parameters() if p.dim() == 4)
    expected = torch.zeros_like(weight)
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        expected += torch.autograd.grad(loss, weight)[0].square() / len(images)
    torch.testing.assert_close(subject.clean.squares[name], expected)


def test_hessian_ranks_by_the_mean_square_of_all_images(subject: Subject) -> None:
    """Upstream would take those of the last one."""
    model = copy.deepcopy(subject.model)
    pruner = build_pruner(model, subject.example)
    group = next(iter(pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types)))
    scores = roster.hessian("clean")(subject, model)(group)
    by_hand = torch.zeros(len(scores), dtype=torch.float64)
    names = {module: name for name, module in model.named_modules()}
    members = 0
    for dependency, indices in group:
        module, squares = (
            dependency.target.module,
            subject.clean.squares.get(f"{names.get(dependency.target.module)}.weight"),
        )
        if squares is None:
            continue
        members += 1
        product = (module.weight.detach().square() * squares).double()
        side = 0 if product.dim() == 1 or pruner.DG.is_out_channel_pruning_fn(dependency.handler) else 1
        by_hand += product.transpose(0, side).reshape(product.shape[side], -1).sum(1)[indices]
    torch.testing.assert_close(scores.double(), by_hand / members / (by_hand / members).mean())


def test_regularised_adds_what_the_pruner_adds_to_gradients(subject: Subject) -> None:
    model = copy.deepcopy(subject.model)
    arguments = pruner_kwargs(model)
    pruner = tp.pruner.GroupNormPruner(
        model, subject.example, importance=tp.importance.MagnitudeImportance(), reg=0.3, **arguments
    )
    model.eval()
    images, labels = subject.calibration[0]
    F.cross_entropy(model(images), labels).backward()
    pruner.regularize(model)
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    Regularised(standard, pruner, every=1)(model, images, labels, lambda images, labels: images).backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_dead_group_costs_nothing_to_prune_on_trial(subject: Subject) -> None:
    groups = prunable_groups(subject.model, subject.example)
    dead = next(group for group in groups if group.name.endswith("layer1.0.conv1"))
    parameters = dict(subject.model.named_parameters())
    with torch.no_grad():
        for name in ("bn1.weight", "bn1.bias"):
            parameters[dead.name.replace("conv1", name)].zero_()
        model = recalibrate(subject.model, subject.calibration, progress=False)
        subject.calibration = [(images, model(images).argmax(1)) for images, _ in subject.calibration]
    subject.eps = 1e-6  # hardly an attack: an untrained network, which is right by its own standard, withstands no more
    scores = roster.tried(subject)
    assert list(scores) == [group.name for group in groups]
    assert scores[dead.name] == 0.5 / roster.TRIED_IMAGES < max(scores.values())


def test_scores_of_your_own(subject: Subject) -> None:
    """A group that matters far more than the others keeps its channels."""
    groups = prunable_groups(subject.model, subject.example)
    scores = {group.name: 1.0 for group in groups} | {groups[-1].name: 1e6}
    pruned = allocated(plain(roster.L2), lambda subject: scores)(subject, Budget("macs", 0.6))
    widths = {name: len(parameter) for name, parameter in pruned.named_parameters()}
    assert widths[f"{groups[-1].name}.weight"] == groups[-1].units


# --- cells -----------------------------------------------------------------------------------------------------------

WORK = Work("digits", "narrowest resnet18", Budget("macs", 0.5), 0)
FEW = {name: CONTENDERS[name] for name in ("random, uniform", "L2, uniform", MAIN)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Subject", lambda *_: untrained())
        run.do(WORK, (0,), FEW, folder, test_images=20)
    return folder


@pytest.fixture
def cells(made: Path, tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two contenders' cells, for each test anew."""
    monkeypatch.setattr(run, "Subject", lambda *_: subject)
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


def _refuse(*_: Any) -> nn.Module:
    raise InputError("macs: out of reach")


def test_what_is_there_is_not_done_again(cells: Path) -> None:
    before = {path: path.read_bytes() for path in cells.rglob("*.json")}
    assert len(before) == 1 + len(FEW)
    run.do(WORK, (0,), dict.fromkeys(FEW, _refuse), cells, test_images=20)
    assert {path: path.read_bytes() for path in cells.rglob("*.json")} == before


def test_a_wider_run_adds_points_to_the_curve(cells: Path) -> None:
    path = run.path_of(cells, WORK, MAIN)
    one_shot = read_json(path, run.FORMAT)["curve"]["0"]
    run.do(WORK, (0, 0.02), {MAIN: CONTENDERS[MAIN]}, cells, test_images=20)
    curve = read_json(path, run.FORMAT)["curve"]
    assert list(curve) == ["0", "0.02"]
    assert curve["0"] == one_shot


def test_other_settings_are_refused(cells: Path) -> None:
    with pytest.raises(InputError, match=r"^out: .* made with other settings"):
        run.do(WORK, (0,), FEW, cells, test_images=30)


def test_another_dense_network_is_refused(cells: Path, subject: Subject) -> None:
    """Differences between contenders are on the same one."""
    with torch.no_grad():
        next(subject.model.parameters())[0] += 1e-6
    with pytest.raises(InputError, match=r"^out: .*dense-0.json was made .* from another dense network; remove all"):
        run.do(WORK, (0,), FEW, cells, test_images=20)


def test_the_cell_of_something_else_is_refused(cells: Path) -> None:
    ours, other = (run.path_of(cells, WORK, name) for name in (MAIN, "L2, uniform"))
    other.write_bytes(ours.read_bytes())
    with pytest.raises(InputError, match=r"^out: expected .*l2-uniform-0.json to be the cell of contender L2, uniform"):
        run.do(WORK, (0,), FEW, cells, test_images=20)
    with pytest.raises(InputError, match=r"^cells: .*l2-uniform-0.json is the cell of mrpf of seed 0; put it back"):
        report.comparisons(cells)


@pytest.mark.parametrize("content", ["", "[]", '{"format": "tp_mrs.pruners/1"', '{"format": "another"}'])
def test_a_damaged_cell_is_named(content: str, cells: Path) -> None:
    path = run.path_of(cells, WORK, MAIN)
    path.write_text(content)
    with pytest.raises(InputError, match=r"^out: .*mrpf-0.json is damaged, remove it"):
        run.do(WORK, (0,), FEW, cells, test_images=20)


def test_two_runs_at_once_lose_nothing(tmp_path: Path) -> None:
    one, other = (run.Cell(tmp_path / "cell.json", {"seed": 0}, {"eps": 0.1}) for _ in range(2))
    one.add(curve={"0": {"clean": 0.9}}, macs=0.5)
    other.add(curve={"1": {"clean": 0.8}}, macs=0.5)
    assert read_json(one.path, run.FORMAT)["curve"] == {"0": {"clean": 0.9}, "1": {"clean": 0.8}}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--jobs", "0"], "jobs: expected an integer >= 1"),
        (["--autoattack", "-5"], "autoattack: expected an integer >= 0"),
        (["--more-images", "-5"], "more_images: expected an integer >= 0"),
        (["--seeds", "-1"], "seed: expected an integer from 0"),
        (["--epochs", "7"], "epochs: expected one of 0, 1"),
        (["--tier", "cpu", "--networks", "digits/vgg11_bn", "--epochs", "1"], "epochs: expected one of 0, got '1'"),
        (["--budgets", "macs-50", "50"], "budgets: expected one of macs-50"),
        (["--networks", "digits/typo"], "networks: expected one of digits/narrowest resnet18"),
        (["--contenders", "L2 uniform"], "contenders: expected one of 'L2, uniform', 'L1, uniform'"),
        (["--out", __file__], "out: cannot write to"),
    ],
)
def test_options_that_the_tier_does_not_have(
    option: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["run", "--tier", "smoke", "--out", str(tmp_path / "cells"), *option])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.rglob("*.json"))


def asked_for(**wanted: Any) -> argparse.Namespace:
    """Options of a run."""
    nothing = dict.fromkeys(("networks", "budgets", "epochs", "seeds", "contenders"))
    return argparse.Namespace(**{"jobs": 1, "more_images": 0, "autoattack": 0, **nothing, **wanted})


def test_a_part_of_a_tier_is_its_budgets_with_the_epochs_asked_for() -> None:
    tier = [
        Part(("digits", "vgg11_bn"), [Budget("macs", 0.5), Budget("macs", 0.25)], ["L2, uniform"], (0, 1)),
        Part(("digits", "vgg11_bn"), [Budget("macs", 0.75)], ["L2, uniform"], (0,)),
        Part(("digits", "resnet18"), [Budget("macs", 0.5)], ["L2, uniform"], (1,)),
    ]
    wanted = asked_for(networks=["digits/vgg11_bn"], epochs=[1.0], seeds=[5], contenders=[MAIN], more_images=7)
    (part,) = run.selected(tier, wanted)
    assert part.second == {MORE: 7}
    assert list(part.points()) == [
        (Work("digits", "vgg11_bn", budget, 5), MAIN, 1) for budget in (Budget("macs", 0.5), Budget("macs", 0.25))
    ]


def test_a_network_of_one_seed_is_the_task_of_one_process() -> None:
    """Which trains the dense one if it is not there."""
    one, other = (Part(("digits", name), [Budget("macs", 0.5)], [MAIN]) for name in ("vgg11_bn", "resnet18"))
    again = Part(("digits", "vgg11_bn"), [Budget("macs", 0.25)], [MAIN], seeds=(1,))
    assert run.tasks([one, other, again]) == {
        (0, one.subject): [one],
        (0, other.subject): [other],
        (1, one.subject): [one, again],
        (1, other.subject): [other],
        (2, one.subject): [one],
        (2, other.subject): [other],
    }


def test_what_is_missing_of_a_part(cells: Path) -> None:
    part = Part(WORK[:2], [WORK.budget], [*FEW, "L2, global"], (0, 1), seeds=(0,), second={MORE: 30})
    found = run.to_do([part, part], cells)
    assert len(found) == 2 * len(FEW) * 2 + 4
    there = [key for key, missing in found.items() if not missing]
    assert there == [(WORK, name, 0, "curve") for name in FEW]


def test_a_cell_tells_what_it_was_fine_tuned_by(cells: Path) -> None:
    name = "L2, uniform, RSLAD"
    run.do(WORK, (0.02,), {name: CONTENDERS[name]}, cells, test_images=20)
    path = run.path_of(cells, WORK, name)
    found = read_json(path, run.FORMAT)
    assert found["retuning"]["objective"].startswith("rslad(teacher=")
    assert found["retuning"]["attack"] == "ffgsm"
    assert "retuning" not in read_json(run.path_of(cells, WORK, MAIN), run.FORMAT)
    write_json(path, {**found, "retuning": {"objective": "mart"}})
    with pytest.raises(InputError, match=r"^out: .*-rslad-0.json was made with other settings"):
        run.do(WORK, (0.02,), {name: CONTENDERS[name]}, cells, test_images=20)


@pytest.mark.parametrize("tier", TIERS)
def test_tiers_name_what_there_is(tier: str) -> None:
    for part in TIERS[tier]:
        assert part.subject in NETWORKS
        assert set(part.contenders) <= set(CONTENDERS)
        assert len(set(part.contenders)) == len(part.contenders)


def test_each_point_of_the_cpu_tier_is_committed() -> None:
    missing = [point for point, missing in run.to_do(TIERS["cpu"], run.CELLS).items() if missing]
    assert not missing


def test_a_contender_that_cannot_meet_the_budget_is_reported(
    tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Subject", lambda *_: subject)
    run.do(WORK, (0,), {"L2, uniform": _refuse, MAIN: CONTENDERS[MAIN]}, tmp_path, test_images=20)
    (comparison,) = report.comparisons(tmp_path)
    assert comparison.common("0") == [MAIN]
    assert "L2, uniform: macs: out of reach" in report.budget_table(comparison)


def test_a_contender_of_your_own_stands_in_the_tables(cells: Path) -> None:
    run.do(WORK, (0,), {"mine": CONTENDERS["L2, uniform"]}, cells, test_images=20)
    (comparison,) = report.comparisons(cells)
    assert comparison.names == [*FEW, "mine"]
    assert comparison.accuracy("mine", "0") == comparison.accuracy("L2, uniform", "0")
    assert report.tables([comparison]).count("\n| mine |") == 2  # its rank, and all about it


def test_autoattack_is_added_to_what_is_there(cells: Path) -> None:
    before = read_json(run.path_of(cells, WORK, MAIN), run.FORMAT)
    run.do(WORK, (0,), FEW, cells, test_images=20, second={WITH_AUTOATTACK: 6})
    (comparison,) = report.comparisons(cells)
    after = comparison.cells[MAIN][0]
    assert {name: after[name] for name in before} == before
    found = after[WITH_AUTOATTACK]["0"]
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["images"] == 6
    assert found["autoattack"] <= found["pgd-20"] <= found["clean"]
    assert found["autoattack"] == report.right({**after, "curve": after[WITH_AUTOATTACK]}, "0", "autoattack").mean()
    table = report.second_tables(comparison, WITH_AUTOATTACK)
    assert "right after pruning: 6 test images, 1 seed." in table
    other = comparison.cells["L2, uniform"][0][WITH_AUTOATTACK]["0"]
    shown = " | ".join(f"{100 * other[column]:.1f}" for column in report.COLUMNS)
    dense = comparison.dense[0][WITH_AUTOATTACK]["0"]
    assert dense["autoattack"] <= dense["pgd-20"] <= dense["clean"]
    assert f"| dense | {' | '.join(f'{100 * dense[column]:.1f}' for column in report.COLUMNS)} |  |  |" in table
    (row,) = (line for line in table.splitlines() if line.startswith(f"| L2, uniform | {shown} | "))
    for column, lead in zip(("clean", "autoattack"), row.split(" | ")[-2:], strict=True):
        assert lead.startswith(f"{100 * (found[column] - other[column]):+.1f} (")


def test_autoattack_may_be_one_of_the_attacks(
    tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: on all test images, for the dense network, too."""
    monkeypatch.setattr(run, "Subject", lambda *_: subject)
    few = {name: CONTENDERS[name] for name in ("L2, uniform", MAIN)}
    run.do(WORK, (0,), few, tmp_path, test_images=6, attacks=("pgd-20", "autoattack"))
    (comparison,) = report.comparisons(tmp_path)
    assert "(clean / PGD-20 / AutoAttack of each seed)" in report.budget_table(comparison)
    run.do(WORK, (0,), few, tmp_path, test_images=6, attacks=("pgd-20", "autoattack"), second={WITH_AUTOATTACK: 4})
    (comparison,) = report.comparisons(tmp_path)
    assert "right after pruning: 4 test images, 1 seed." in report.tables([comparison])


def test_a_second_look_is_on_as_many_images_everywhere(cells: Path) -> None:
    few = {MAIN: CONTENDERS[MAIN]}
    run.do(WORK, (0,), few, cells, test_images=20, second={MORE: 30})
    with pytest.raises(InputError, match=r"^out: .*dense-0.json was evaluated once more .* on 30 images, not 25; ask"):
        run.do(WORK, (0,), FEW, cells, test_images=20, second={MORE: 25})


def test_where_there_are_more_images_the_summary_is_of_them(cells: Path) -> None:
    run.do(WORK, (0,), FEW, cells, test_images=20, second={MORE: 30})
    (comparison,) = report.comparisons(cells)
    accuracy = 100 * comparison.cells[MAIN][0][MORE]["0"]["pgd-20"]
    (row,) = report.summary([comparison]).splitlines()[2:]
    assert row.startswith("| digits, narrowest resnet18, 50% of the MACs | none | 1 × 30 | ")
    assert f" / {accuracy:.1f} | " in row
    for name in FEW:
        del comparison.cells[name][0][MORE]
    assert "| 1 × 20 |" in report.summary([comparison])


def test_a_damaged_cell_does_not_keep_the_others_waiting(cells: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.path_of(cells, WORK, MAIN).write_text("[]")
    quarter = Budget("macs", 0.25)
    part = Part(WORK[:2], [WORK.budget, quarter], [MAIN], seeds=(0,), test_images=20)
    with pytest.raises(InputError, match=r"^out: .*mrpf-0.json is damaged, remove it"):
        run._do_parts([part], 0, cells, None)
    assert run.path_of(cells, WORK._replace(budget=quarter), MAIN).exists()


def test_more_images_are_added_to_what_is_there(cells: Path) -> None:
    before = read_json(run.path_of(cells, WORK, MAIN), run.FORMAT)
    run.do(WORK, (0,), FEW, cells, test_images=20, second={MORE: 30})
    (comparison,) = report.comparisons(cells)
    after = comparison.cells[MAIN][0]
    assert {name: after[name] for name in before} == before
    again = {**after, "curve": after[MORE]}
    assert report.right(again, "0")[:20].tolist() == report.right(after, "0").tolist()
    other = {**comparison.cells["L2, uniform"][0], "curve": comparison.cells["L2, uniform"][0][MORE]}
    lead = report.lead_text(report.bootstrap([report.right(again, "0") - report.right(other, "0")]))
    table = report.second_tables(comparison, MORE)
    assert "**PGD-20**, digits, narrowest resnet18, 50% of the MACs, right after pruning: 30 test images" in table
    (row,) = (line for line in table.splitlines() if line.startswith("| L2, uniform |"))
    assert row.endswith(f"| {lead} |")


def test_made_again_cells_are_compared_image_by_image(
    cells: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    run.do(WORK, (0,), {MAIN: CONTENDERS[MAIN]}, cells, test_images=20, second={MORE: 30})
    folder = tmp_path_factory.mktemp("again")
    for path in cells.glob("*/*/*.json"):
        again.again(path, folder, None)
    lines = [line for line in capsys.readouterr().out.splitlines() if "images differ" in line]
    assert len(lines) == len(FEW) + 1
    assert all(line.endswith("; 0 images differ") for line in lines)
    path = run.path_of(cells, WORK, MAIN)
    cell = json.loads(path.read_text())
    outcomes = cell["curve"]["0"]["outcomes"]
    outcomes["pgd-20"] = f"{int(outcomes['pgd-20'][0], 16) ^ 8:x}{outcomes['pgd-20'][1:]}"
    cell["curve"]["0"]["pgd-20"] = report.right(cell, "0").mean()
    path.write_text(json.dumps(cell))
    again.again(path, folder, None)
    differing = [line.rpartition("; ")[2] for line in capsys.readouterr().out.splitlines()]
    assert differing == ["1 images differ", "0 images differ"]


# --- report ----------------------------------------------------------------------------------------------------------


def test_the_report_is_made_from_the_cells_byte_for_byte(cells: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MANY", len(FEW))
    made = []
    for name in ("one", "two"):
        monkeypatch.setattr("sys.argv", ["report", "--cells", str(cells), "--out", str(cells / name)])
        report.main()
        made.append({path.name: path.read_bytes() for path in (cells / name).iterdir()})
    assert made[0] == made[1]
    assert set(made[0]) == {"report.md", "pruners-all.png", "pruners-budgets.png", "pruners-widths.png"}
    text = made[0]["report.md"].decode()
    accuracy = read_json(run.path_of(cells, WORK, MAIN), run.FORMAT)["curve"]["0"]["pgd-20"]
    assert f"| **{MAIN}** |" in text
    assert f"{100 * accuracy:.1f} |" in text


def test_the_report_refuses_cells_that_do_not_fit(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(InputError, match=r"^cells: .* has none; make some by"):
        report.comparisons(tmp_path_factory.mktemp("empty"))
    path = run.path_of(cells, WORK, MAIN)
    content = read_json(path, run.FORMAT)
    write_json(path, {name: value for name, value in content.items() if name != "budget"})
    with pytest.raises(InputError, match=r"^cells: .*mrpf-0.json has no budget; remove it"):
        report.comparisons(cells)
    write_json(path, {name: value for name, value in content.items() if name != "curve"})
    with pytest.raises(InputError, match=r"^cells: .*mrpf-0.json has no results; remove it"):
        report.comparisons(cells)
    write_json(path, {**content, "curve": {"0": {**content["curve"]["0"], "clean": 2.0}}})
    with pytest.raises(InputError, match=r"^cells: .*mrpf-0.json says another .* \(curve, 0, clean\); remove it"):
        report.comparisons(cells)
    write_json(path, {**content, "widths": None, "curve": []})
    with pytest.raises(InputError, match=r"^cells: .*mrpf-0.json has no results; remove it"):
        report.comparisons(cells)
    write_json(path, {**content, "curve": {"0": {"clean": 0.5}}})
    with pytest.raises(InputError, match=r"^cells: .*mrpf-0.json is no whole cell \(KeyError\('outcomes'\)\)"):
        report.comparisons(cells)
    write_json(path, {**content, "settings": {**content["settings"], "test_images": 30}})
    with pytest.raises(InputError, match=r"^cells: .*mrpf-0.json and its dense-0.json were not made by the same"):
        report.comparisons(cells)
    dense = next(cells.rglob("dense-0.json"))
    write_json(dense, {**read_json(dense, run.FORMAT), "pgd-20": 0.99})
    with pytest.raises(InputError, match=r"^cells: .*dense-0.json says another accuracy .* \(curve, 0, pgd-20\)"):
        report.comparisons(cells)
    dense.unlink()
    with pytest.raises(InputError, match=r"and its dense-0.json were not made"):
        report.comparisons(cells)


def test_committed_files_stay_where_other_cells_are_meant(
    cells: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, options in ((report.main, []), (again.main, ["--out", str(cells)])):
        monkeypatch.setattr("sys.argv", ["benchmark", "--cells", str(cells), *options])
        with pytest.raises(SystemExit):
            main()
        assert "error: out: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--seeds", "-4"], "seed: expected an integer from 0"),
        (["--contenders", "mprf"], "contenders: expected one of mrpf"),
        (["--budgets", "macs-75"], "has none of these"),
    ],
)
def test_options_that_no_cell_has(
    option: list[str],
    message: str,
    cells: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["again", "--cells", str(cells), "--out", str(cells / "new"), *option])
    with pytest.raises(SystemExit):
        again.main()
    assert message in capsys.readouterr().err


def test_without_their_data_cells_are_not_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TP_MRS_DATA", raising=False)
    for main, chosen in ((again.main, []), (run.main, ["--tier", "cpu"])):
        arguments = ["--out", str(tmp_path), "--networks", "cifar10/resnet18", "--seeds", "0", *chosen]
        monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
        with pytest.raises(SystemExit):
            main()
        shown = capsys.readouterr()
        assert "error: data-dir: nothing is left to do; cifar10 is left out: " in shown.err


def test_the_readme_files_show_the_committed_cells() -> None:
    found = report.comparisons(run.CELLS)
    assert report.tables(found) in (report.FOLDER / "README.md").read_text(encoding="utf-8")
    assert report.summary(found, details=False) in (report.FOLDER.parent / "README.md").read_text(encoding="utf-8")


def cell(seed: int, right: str, images: int) -> dict[str, Any]:
    packed = np.packbits([int(bit) for bit in right]).tobytes().hex()
    value = right.count("1") / images
    point = {"clean": 1.0, "pgd-20": value, "outcomes": {"pgd-20": packed}}
    return {"seed": seed, "settings": {"test_images": images}, "curve": {"0": point}, "macs": 0.5, "params": 0.5}


def test_leads_are_paired_by_image_and_seed() -> None:
    """By hand: 10 images, two seeds; ours is right on 3 and 1 images more."""
    ours = {0: cell(0, "1111100000", 10), 1: cell(1, "1111111111", 10)}
    theirs = {0: cell(0, "1100000000", 10), 1: cell(1, "1111111110", 10)}
    key = report.Key("digits", "net", "macs", 0.5)
    comparison = report.Comparison(key, {MAIN: ours, "L2, uniform": theirs, "L2, global": {0: theirs[0]}}, {})
    mean, low, high = comparison.lead("L2, uniform", "0")
    assert mean == pytest.approx(20)
    assert 0 <= low < 20 < high <= 70
    assert comparison.others("0") == ["L2, uniform"]  # the other one lacks a seed
    assert comparison.shared("L2, global", "0") == [0]
    assert comparison.only([1]).others("0") == ["L2, uniform"]
    assert comparison.only([0]).others("0") == ["L2, uniform", "L2, global"]
    assert comparison.lead(MAIN, "0") == (0, 0, 0)


def test_the_summary_has_the_first_and_the_last_point_of_each_curve() -> None:
    def curve(*points: str) -> dict[int, dict[str, Any]]:
        plain = cell(0, "1100000000", 10)
        return {0: {**plain, "curve": dict.fromkeys(points, plain["curve"]["0"])}}

    plain = {MAIN: curve("0", "0.1", "1"), "L2, uniform": curve("0", "0.1", "1")}
    cells = {**plain, "mrpf, MART": curve("0", "1"), "L2, uniform, MART": curve("1")}
    dense = {0: {"clean": 1.0, "pgd-20": 0.2}}
    comparison = report.Comparison(report.Key("digits", "net", "macs", 0.5), cells, dense)
    rows = [row.split(" | ") for row in report.summary([comparison]).splitlines()[2:]]
    assert [(row[1], row[4]) for row in rows] == [
        ("none", "100.0 / 20.0"),
        ("1 epoch", "100.0 / 20.0"),
        ("1 epoch, MART", "100.0 / 20.0"),
    ]
    assert rows[0][5:8] == ["", "", "100.0 / 20.0 (L2, uniform; 1)"]
    assert rows[2][5:8] == ["", "", "100.0 / 20.0 (L2, uniform; 1)"]
    assert rows[0][9:] == ["+0.0", "50.0 / 50.0, 50.0 / 50.0 |"]
    brief = report.summary([comparison], details=False).splitlines()[2]
    assert brief == f"{' | '.join(rows[0][:9])} |"


def test_what_is_fine_tuned_alike_is_compared() -> None:
    found = {MAIN: "1000000000", "L2, uniform": "1100000000"}
    found |= {"mrpf, RSLAD": "1111000000", "L2, uniform, RSLAD": "1110000000"}
    cells = {name: {seed: cell(seed, bits, 10) for seed in (0, 1)} for name, bits in found.items()}
    for one in (one for of in cells.values() for one in of.values()):
        point = one["curve"]["0"]
        point["images"], point["outcomes"]["clean"] = 10, np.packbits([1] * 10).tobytes().hex()
        one[MORE] = one["curve"] = {"1": point}
    dense = {seed: {"clean": 1.0, "pgd-20": 0.2, "settings": {"eps": "0.1", "test_images": 10}} for seed in (0, 1)}
    comparison = report.Comparison(report.Key("digits", "net", "macs", 0.5), cells, dense)
    assert comparison.alike("1") == ["L2, uniform", MAIN]
    assert comparison.others("1", "mrpf, RSLAD") == ["L2, uniform, RSLAD"]
    usual, distilled = report.second_tables(comparison, MORE).split("\n\n**")
    assert "after 1 epoch of fine-tuning: 10 test images" in usual
    assert "| L2, uniform | 100.0 | 20.0 | +0.0 (+0.0 to +0.0) | -10.0 (" in usual
    assert "after 1 epoch of fine-tuning by RSLAD: 10 test images" in distilled
    assert "| L2, uniform, RSLAD | 100.0 | 30.0 | +0.0 (+0.0 to +0.0) | +10.0 (" in distilled
    table = report.budget_table(comparison)
    assert "| L2, uniform, RSLAD | 50.0 | 50.0 | 100.0 / 30.0 | +10.0 (" in table
    assert "| **mrpf, RSLAD** | 50.0 | 50.0 | 100.0 / 40.0 |  |" in table


def test_another_objective_is_not_tried_without_fine_tuning() -> None:
    assert points_of("mrpf, RSLAD", (0, 1, 2)) == [1, 2]
    assert points_of("mrpf", (0, 1, 2)) == [0, 1, 2]
    with pytest.raises(InputError, match=r"^epochs: mrpf, RSLAD are other ways of fine-tuning; ask for some"):
        run.selected(TIERS["smoke"], asked_for(epochs=[0.0], contenders=["mrpf, RSLAD"]))


def test_where_ours_is_missing_the_others_are_shown_all_the_same() -> None:
    others = {"L2, uniform": {seed: cell(seed, "1100000000", 10) for seed in (0, 1)}, "L2, global": {}}
    others["L2, global"] = {0: others["L2, uniform"][0]}
    dense = {0: {"clean": 1.0, "pgd-20": 0.2, "settings": {"eps": "0.1", "test_images": 10}}}
    table = report.budget_table(report.Comparison(report.Key("digits", "net", "macs", 0.5), others, dense))
    assert "| right after pruning, 2 seeds: clean / PGD-20 | mrpf less this |" in table
    assert "| L2, uniform | 50.0 | 50.0 | 100.0 / 20.0 |  |" in table
    assert "| L2, global | 50.0 | 50.0 | 100.0 / 20.0 (1 seed) |  |" in table


def test_parts_of_the_criterion_are_held_against_the_whole() -> None:
    right = {report.WHOLE: "1111100000", "with more of it: α = 1": "1111000000", "mrpf, 1 step": "1111111111"}
    cells = {name: {seed: cell(seed, bits, 10) for seed in (0, 1)} for name, bits in right.items()}
    table = report.ablation(report.Comparison(report.Key("digits", "net", "macs", 0.5), cells, {}))
    assert table.splitlines()[-2] == f"| **{report.WHOLE}** | 50.0 |  |  |"
    assert table.splitlines()[-1].startswith("| with more of it: α = 1 | 40.0 | -10.0 (")
    assert table.endswith(" | -10.0 -10.0 |")
    assert not report.ablation(report.Comparison(report.Key("digits", "net", "macs", 0.5), {MAIN: {}}, {}))


def test_recovery_is_read_off_the_line_between_points() -> None:
    assert report.crossing([0, 0.1, 0.5], [20, 30, 50], 40) == pytest.approx(0.3)
    assert report.crossing([0, 0.1], [40, 30], 40) == 0
    assert report.crossing([0, 0.1, 0.2], [20, 40, 30], 40) == pytest.approx(0.1)
    assert report.crossing([0, 0.1], [20, 30], 40) is None


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 200 experiments with many seeds; fewer seeds make it rougher. Some images are harder than others, for all."""
    random, inside = np.random.default_rng(1), 0
    for _ in range(200):
        chances = random.beta(0.6, 1.4, size=50)
        samples = [(random.random(50) < chances).astype(float) for _ in range(10)]
        _, low, high = report.bootstrap(samples)
        inside += low <= 30 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_images_are_counted_without_padding() -> None:
    """Ten bits fill two bytes."""
    assert report.right(cell(0, "1000000001", 10), "0").tolist() == [1, *[0] * 8, 1]
