"""The command line, run in this process on a small subset; the whole default job is among the slow tests."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tp_mrs
from tp_mrs.checkpoints import Checkpoint
from tp_mrs.cli import commands
from tp_mrs.cli.arguments import parse
from tp_mrs.cli.doctor import OPTIONAL
from tp_mrs.tensorfile import read

Capture = pytest.CaptureFixture[str]
TUNE = ["--epochs", "0.05", "--test-images", "20", "--attacks", "fgsm", "--quiet"]
QUICK = ["--dense-epochs", "0.05", "--calibration-images", "32", "--test-images", "20", "--attacks", "fgsm", "--quiet"]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_MRS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def run(*arguments: str) -> int:
    try:
        return commands.main(arguments)
    except SystemExit as stop:  # argparse's own refusals
        return int(stop.code or 0)


def test_prune_writes_a_model_a_report_and_a_plot(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    assert run("prune", *QUICK, "--epochs", "0.05", "--out", str(out)) == 0
    screen = capsys.readouterr().out
    for word in ("clean", "fgsm", "dense", "pruned", "fine-tuned", "MACs (M)", "model.safetensors"):
        assert word in screen
    report = json.loads((out / "report.json").read_text())
    assert report["rounds"][0]["reached"] == pytest.approx(0.5, rel=0.01)
    given = parse(["prune", *QUICK, "--epochs", "0.05", "--macs", "0.5", "--out", str(out)])
    assert parse(["prune", "--config", str(out / "run.yaml")]) == given
    model = tp_mrs.load(out / "model.safetensors")
    assert model(torch.rand(1, 1, 32, 32)).shape == (1, 10)
    assert model.class_names == list("0123456789")
    assert (out / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "sensitivity.svg").read_text()
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "report.html",
        "report.json",
        "run.yaml",
        *(f"{name}.{kind}" for name in ("sensitivity", "training", "widths") for kind in ("png", "svg")),
    ]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "resnet10t on digits, pruned to" in page


def test_evaluations_at_more_sizes(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    assert run("prune", *QUICK, "--epochs", "0", "--more-eps", "1/5", "0.1", "0.05", "--out", str(out)) == 0
    screen = capsys.readouterr().out
    assert "dense, accuracy by size" in screen
    assert "pruned, accuracy by size" in screen
    curves = json.loads((out / "report.json").read_text())["curves"]
    assert {name: [each["eps"] for each in curve] for name, curve in curves.items()} == {
        "dense": [0.05, 0.1, 0.2],
        "pruned": [0.05, 0.1, 0.2],
    }
    assert "Accuracy against the size" in (out / "report.html").read_text()
    assert (out / "robustness.png").exists()
    checkpoint = ["--checkpoint", str(out / "model.safetensors")]
    sizes = ["--more-eps", "0.05", "1/5"]
    assert run("evaluate", *QUICK, *checkpoint, *sizes, "--out", str(tmp_path / "again")) == 0
    screen = capsys.readouterr().out
    assert "model.safetensors, accuracy by size" in screen
    assert "and a picture" in screen
    written = json.loads((tmp_path / "again/evaluation.json").read_text())
    assert [each["outcomes"] for each in written["curve"]] == [each["outcomes"] for each in curves["pruned"]]
    assert tp_mrs.Evaluation.from_dict(written) == tp_mrs.Evaluation.from_dict(written["curve"][1])
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(commands.EVALUATED)


def test_an_evaluation_at_one_size_has_no_curve(tmp_path: Path, capsys: Capture) -> None:
    assert run("evaluate", *QUICK, "--out", str(tmp_path)) == 0
    assert "by size" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "run.yaml"]
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["curve"]) == 1


def test_a_dry_run_tells_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("TP_MRS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    options = [*QUICK, "--epochs", "0", "--macs", "0.4", "--more-eps", "0.2", "--iterative-steps", "1"]
    assert run("prune", *options, "--dry-run") == 0
    assert "There is no dense model yet (the run trains one, 0.05 epochs)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert run("prune", *options, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    before = sorted(tmp_path.rglob("*"))
    assert run("prune", *options, "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(tmp_path.rglob("*")) == before
    ratios = {name: group["ratio"] for name, group in found["groups"].items()}
    assert ratios == pytest.approx(report["rounds"][0]["ratios"], abs=0.005)
    assert found["macs"] == [report["before"]["macs"], report["after"]["macs"]]
    assert found["params"] == [report["before"]["params"], report["after"]["params"]]
    assert all(1 <= group["after"] <= group["before"] for group in found["groups"].values())
    assert found["passes"] == pytest.approx(
        {"measuring": 11 * 32 / 1297, "fine-tuning": 0, "evaluating": (2 + 2) * (1 + 2 / 3) * 20 / 1297}
    )


def test_the_dense_model_is_kept_and_reused(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert run("evaluate", *QUICK, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("tp_mrs.dense.finetune", lambda *_, **__: pytest.fail("trained again"))
    assert run("evaluate", *QUICK, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert first["outcomes"] == again["outcomes"]


def test_a_pruned_model_can_be_evaluated_and_pruned_again(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "a"
    assert run("prune", *QUICK, "--epochs", "0", "--params", "0.6", "--out", str(out), "--json") == 0
    pruned = json.loads(capsys.readouterr().out)["after"]
    checkpoint = str(out / "model.safetensors")
    assert run("evaluate", *QUICK, "--checkpoint", checkpoint, "--json") == 0
    assert json.loads(capsys.readouterr().out)["params"] == pruned["params"]
    assert (
        run("prune", *QUICK, "--checkpoint", checkpoint, "--epochs", "0", "--out", str(tmp_path / "b"), "--json") == 0
    )
    assert json.loads(capsys.readouterr().out)["before"]["params"] == pruned["params"]


def test_a_plain_state_dict_as_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    model = tp_mrs.create_model("resnet18", num_classes=10, in_chans=1, image_size=32, channels=(8, 8, 8, 8))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "plain.safetensors")
    options = ["--model", "resnet18", "--checkpoint", str(tmp_path / "plain.safetensors"), "--json"]
    assert run("evaluate", *QUICK, *options, "--model-kwargs", "channels=8,8,8,8") == 0
    expected = sum(p.numel() for p in model.parameters())
    assert json.loads(capsys.readouterr().out)["params"] == expected
    assert run("evaluate", *QUICK, *options, "--model-kwargs", "channels=4,4,4,4") == 2
    assert "path: conv1.weight" not in (error := capsys.readouterr().err)
    assert "the architecture's is" in error


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A small model for digits as `tp_mrs.save` writes it."""
    model = tp_mrs.create_model("resnet18", num_classes=10, in_chans=1, image_size=32, channels=(8, 8, 8, 8))
    return str(tp_mrs.save(tp_mrs.normalize(model, [0.3], [0.3]), tmp_path / "saved.safetensors"))


def test_finetune_writes_the_model_and_a_record(saved: str, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert run("finetune", *TUNE, "--checkpoint", saved, "--accumulate", "2", "--out", str(out)) == 0
    screen = capsys.readouterr().out
    for word in ("before", "after", "clean", "fgsm", "Change", "model.safetensors", "finetuning.json"):
        assert word in screen
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "finetuning.json",
        "log.jsonl",
        "model.safetensors",
        "run.yaml",
        "training.png",
        "training.svg",
    ]
    assert [json.loads(line)["epoch"] for line in (out / "log.jsonl").read_text().splitlines()] == [1]
    record = json.loads((out / "finetuning.json").read_text())
    assert record["settings"]["accumulate"] == 2
    assert record["settings"]["attack"].startswith("PGD")
    assert record["arguments"]["checkpoint"] == saved
    assert record["history"][0]["images"] == 64
    assert record["before"]["checksum"] == record["after"]["checksum"]
    assert "torch" in record["versions"]
    before, after = tp_mrs.load(saved), tp_mrs.load(out / "model.safetensors")
    assert after.class_names == list("0123456789")
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    assert all(old.shape == new.shape for old, new in pairs)
    assert any(not torch.equal(old, new) for old, new in pairs)


def test_finetune_a_plain_state_dict_with_a_teacher(saved: str, tmp_path: Path, capsys: Capture) -> None:
    model = tp_mrs.create_model("resnet10t", num_classes=10, in_chans=1, image_size=32, channels=(8, 8, 8, 8))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "plain.safetensors")
    options = ["--model", "resnet10t", "--model-kwargs", "channels=8,8,8,8"]
    options += ["--checkpoint", str(tmp_path / "plain.safetensors"), "--objective", "rslad-awp", "--teacher", saved]
    assert run("finetune", *TUNE, *options, "--out", str(tmp_path / "out"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["settings"]["objective"].startswith("awp(rslad(")
    tuned: Any = tp_mrs.load(tmp_path / "out" / "model.safetensors")
    assert tuned.tp_mrs_recipe["architecture"] == "resnet10t"


def test_finetune_validates_on_images_held_out(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def stops(model: Any, data: Any, **training: Any) -> None:
        given.clear()
        given.update(training, train_images=len(data.dataset))
        raise tp_mrs.InputError("enough")

    monkeypatch.setattr(commands, "check_training", stops)
    options = ["--validation-images", "100", "--patience", "3", "--ema", "0.99"]
    assert run("finetune", *TUNE, "--checkpoint", saved, *options, "--out", str(tmp_path / "out")) == 2
    assert (given["patience"], given["ema"], given["train_images"]) == (3, 0.99, 1197)
    assert len(given["validation_data"].dataset) == 100
    assert run("finetune", *TUNE, "--checkpoint", saved, "--out", str(tmp_path / "out")) == 2
    assert given["train_images"] == 1297
    assert not {"patience", "ema", "validation_data", "accumulate"} & set(given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint: give the model to fine-tune, --checkpoint FILE.safetensors"),
        (["--checkpoint", "SAVED", "--objective", "ard"], "teacher: ard needs a robust model to learn from; give"),
        (["--checkpoint", "SAVED", "--teacher", "SAVED"], "teacher: pgd learns from labels; for a teacher take"),
        (["--checkpoint", "FOUR"], "four.safetensors has 4 classes, but digits has 10; give a model made for this"),
        (["--checkpoint", "SAVED", "--objective", "ard", "--teacher", "FOUR"], "teacher: the model in"),
        (["--checkpoint", "SAVED", "--objective", "ard", "--teacher", "/nowhere"], "teacher: cannot read /nowhere"),
        (["--checkpoint", "SAVED", "--accumulate", "0"], "accumulate: expected an integer >= 1"),
        (["--checkpoint", "SAVED", "--epochs", "0"], "epochs: expected a number > 0"),
        (["--checkpoint", "SAVED", "--validation-images", "1297"], "validation_images: expected fewer than the 1297"),
        (["--checkpoint", "SAVED", "--workers", "-1"], "workers: expected an integer >= 0"),
        (["--checkpoint", "OUT/model.safetensors"], "out: the results would replace the checkpoint"),
        (["--checkpoint", "OUT"], "checkpoint: cannot read"),
        (["--checkpoint", "SAVED", "--model", "resnet50"], "not a resnet50; leave out --model, or choose another"),
    ],
)
def test_finetune_refuses_before_it_trains(
    arguments: list[str], message: str, saved: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "evaluate", lambda *_, **__: pytest.fail("evaluated before checking"))
    four = tp_mrs.create_model("resnet18", num_classes=4, in_chans=1, image_size=32, channels=(8, 8, 8, 8))
    tp_mrs.save(four, tmp_path / "four.safetensors")
    names = {"SAVED": saved, "FOUR": str(tmp_path / "four.safetensors"), "OUT": str(tmp_path / "out")}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    assert run("finetune", *TUNE, *arguments, "--out", str(tmp_path / "out")) == 2
    assert message in (error := capsys.readouterr().err)
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "timm/resnet18.a1_in1k", "local-dir:resnet"])
def test_a_checkpoint_of_the_named_model_is_taken(name: str, saved: str) -> None:
    assert run("evaluate", *QUICK, "--checkpoint", saved, "--model", name) == 0


def test_a_model_of_other_classes_is_not_evaluated(tmp_path: Path, capsys: Capture) -> None:
    model = tp_mrs.create_model("resnet18", num_classes=4, in_chans=1, image_size=32, channels=(8, 8, 8, 8))
    tp_mrs.save(model, tmp_path / "four.safetensors")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "plain.safetensors")
    assert run("evaluate", *QUICK, "--checkpoint", str(tmp_path / "four.safetensors")) == 2
    assert "has 4 classes, but digits has 10" in capsys.readouterr().err
    options = ["--model", "resnet18", "--model-kwargs", "channels=8,8,8,8"]
    assert run("evaluate", *QUICK, *options, "--checkpoint", str(tmp_path / "plain.safetensors")) == 2
    assert "plain.safetensors has 4 classes, but digits has 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("plain", "checkpoint: the model in colour.safetensors has 3 channels, but digits has 1; give a model made"),
        ("saved", "checkpoint: colour.safetensors does not fit digits (images: the model cannot run on"),
        ("normalised", "checkpoint: colour.safetensors does not fit digits (images: the model cannot run on"),
    ],
)
def test_a_model_for_other_images_is_not_evaluated(
    kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tp_mrs.create_model("resnet18", num_classes=10, image_size=32, channels=(8, 8, 8, 8))
    if kind == "plain":
        safetensors.torch.save_file(model.state_dict(), "colour.safetensors")
    else:
        tp_mrs.save(model if kind == "saved" else tp_mrs.normalize(model, [0.5] * 3, [0.5] * 3), "colour.safetensors")
    options = ["--model", "resnet18", "--model-kwargs", "channels=8,8,8,8"]
    assert run("evaluate", *QUICK, *options, "--checkpoint", "colour.safetensors") == 2
    assert message in capsys.readouterr().err


def test_sensitivity_prints_and_writes(tmp_path: Path, capsys: Capture) -> None:
    assert run("sensitivity", *QUICK, "--out", str(tmp_path)) == 0
    assert "Module Robustness Sensitivity on 32 images" in capsys.readouterr().out
    assert tp_mrs.Sensitivity.load(tmp_path / "sensitivity.json").images == 32
    assert (tmp_path / "sensitivity.svg").exists()
    assert run("sensitivity", *QUICK, "--estimator", "pga", "--steps", "1", "--json") == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert run("sensitivity", *QUICK, "--steps", "0") == 2
    assert "steps: expected an integer >= 1" in capsys.readouterr().err
    assert printed["settings"]["steps"] == 1
    assert set(printed["groups"]) == set(printed["members"])


def test_json_is_all_there_is_on_stdout(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_MRS_CACHE", str(tmp_path / "cache"))
    loud = [option for option in QUICK if option != "--quiet"]
    assert run("prune", *loud, "--epochs", "0", "--out", str(tmp_path / "run"), "--json") == 0
    screen = capsys.readouterr()
    assert json.loads(screen.out) == json.loads((tmp_path / "run" / "report.json").read_text())
    assert "\r" not in screen.err  # no bars where there is no terminal


def test_a_reader_that_has_enough() -> None:
    command = ["sh", "-c", f"{sys.executable} -m tp_mrs completion bash | true"]
    assert "Traceback" not in subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(shell: str, capsys: Capture) -> None:
    assert run("completion", shell) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("sensitivity", "calibration-images", "no-download"))
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_completion_of_another_shell(capsys: Capture) -> None:
    assert run("completion", "tcsh") == 2
    assert "shell: expected one of bash, zsh, fish, got 'tcsh'" in capsys.readouterr().err


def test_doctor_says_what_is_there(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_MRS_CACHE", str(tmp_path))
    (tmp_path / "model").write_bytes(bytes(1_500_000))
    monkeypatch.setattr("tp_mrs.cli.doctor._installed", lambda package: None if package == "onnx" else "1.2")
    assert run("doctor") == 0
    screen = capsys.readouterr().out
    for text in ("torch-pruning", f"{tmp_path} (1 files, 1.5 MB)", 'Missing: onnx; pip install "tp_mrs[export]"'):
        assert text in screen
    assert run("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == {"export": ["onnx"]}
    assert found["packages"]["torch"] == version("torch")
    assert found["devices"][0] == "cpu"


def test_doctor_knows_the_extras() -> None:
    config = ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    for extra, packages in OPTIONAL.items():
        assert re.findall(r"^[\w-]+", config["options.extras_require"][extra], re.MULTILINE) == list(packages)


def test_doctor_needs_no_optional_package() -> None:
    packages = "matplotlib", "rich", "sklearn", "shtab", "onnx", "onnxruntime", "onnxscript"
    code = f"import sys; sys.modules |= dict.fromkeys({packages}); from tp_mrs.cli import main; main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torchattacks" in done.stdout


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("prune", "report.json"),
        ("finetune", "model.safetensors"),
        ("finetune", "log.jsonl"),
        ("sensitivity", "sensitivity.svg"),
    ],
)
def test_a_folder_in_the_place_of_a_result_is_seen_at_once(
    command: str, file: str, saved: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tp_mrs.cli.jobs.Job.model", lambda _: pytest.fail("began to work"))
    (tmp_path / "out" / file).mkdir(parents=True)
    assert run(command, "--checkpoint", saved, "--out", str(tmp_path / "out")) == 2
    assert f"out: cannot write {tmp_path / 'out' / file}, it is a folder; remove it" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], *([name] for name in commands.COMMANDS)])
def test_help(command: list[str], capsys: Capture) -> None:
    assert run(*command, "--help") == 0
    assert "usage: tp-mrs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--macs", "0"], "macs: expected a number in (0, 1], got 0.0"),
        (["--macs", "1.2"], "macs: expected"),
        (["--macs", "0.5", "--params", "0.5"], "give exactly one budget"),
        (["--macs", "half"], "--macs: invalid float value: 'half'"),
        (["--eps", "-1"], "eps: expected a value in [0, 1]"),
        (["--eps", "abc"], "eps: expected a number or a fraction such as 8/255, got 'abc'"),
        (["--eps", "8"], "did you mean 8/255"),
        (["--more-eps", "8"], "more_eps: expected a value in [0, 1]"),
        (["--model", "resnet81"], "model: timm has no architecture 'resnet81'; did you mean"),
        (["--model-kwargs", "channels"], "model-kwargs: expected key=value"),
        (["--data", "mnist"], "data: expected one of digits, cifar10"),
        (["--data", "cifar10"], "data_dir: cifar10 needs the folder"),
        (["--data", "cifar10", "--data-dir", "/nowhere"], "data_dir: /nowhere is not a folder"),
        (["--objective", "pdg"], "objective: expected one of standard, fgsm, pgd, trades"),
        (["--attack", "pdg"], "attack: no torchattacks attack is called 'pdg'; did you mean 'pgd'"),
        (["--attacks", "fgsm", "pdg"], "attacks: no torchattacks attack is called 'pdg'"),
        (["--train-attack", "pdg"], "train_attack: no torchattacks attack is called 'pdg'"),
        (["--estimator", "sam"], "estimator: expected one of first_order, pga"),
        (["--base", "l7"], "base: expected one of sensitivity, taylor, magnitude"),
        (["--optimizer", "sgdd"], "optimizer: expected one of"),
        (["--checkpoint", "/nowhere.safetensors"], "checkpoint: cannot read /nowhere.safetensors, there is no"),
        (["--device", "toaster"], "device: cannot use 'toaster' here"),
        (["--batch-size", "0"], "batch_size: expected an integer >= 1"),
        (["--test-images", "0"], "test_images: expected an integer >= 1"),
        (["--rounds", "0"], "rounds: expected an integer >= 1"),
        (["--lr", "0"], "lr: expected a number in (0, 10]"),
        (["--epochs", "-1"], "epochs: expected a number >= 0"),
        (["--out", "/dev/null/x"], "out: cannot write to /dev/null/x"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TP_MRS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tp_mrs.dense.finetune", lambda *_, **__: pytest.fail("trained before checking"))
    assert run("prune", *QUICK, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_diverging_training_exits_with_one(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def diverges(*_: Any, **__: Any) -> None:
        raise tp_mrs.DivergenceError("the loss became nan")

    monkeypatch.setattr(commands, "evaluate", diverges)
    assert run("evaluate", *QUICK) == 1
    assert "the loss became nan" in capsys.readouterr().err


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "tp_mrs", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"tp-mrs {tp_mrs.__version__}"


@pytest.mark.slow
def test_the_default_job_keeps_robustness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_MRS_CACHE", str(tmp_path / "cache"))
    assert run("prune", "--out", str(tmp_path / "run")) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rounds"][0]["reached"] <= 0.505
    assert report["before"]["robust"]["pgd-20"] > 0.7
    assert report["after"]["robust"]["pgd-20"] >= report["before"]["robust"]["pgd-20"] - 0.03


def content_of(path: Path) -> tuple[Any, dict[str, bytes]]:
    """What a model's file holds; the order of its two metadata is up to chance."""
    metadata, tensors = read(path)
    return metadata, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_a_job_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("TP_MRS_CACHE", str(tmp_path / "cache"))
    command = ["prune", *QUICK, "--epochs", "0.05", "--json", "--out"]
    assert run(*command, str(tmp_path / "undisturbed")) == 0
    (dense,) = (tmp_path / "cache").iterdir()
    trained = content_of(dense)
    dense.unlink()
    write, written = Checkpoint.write, iter(range(1, 100))

    def stops(self: Checkpoint, state: Any) -> None:
        write(self, state)
        if next(written) in (1, 3, 5):  # after the dense model's training, its evaluation, and fine-tuning
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "write", stops)
    out = tmp_path / "stopped"
    for _ in range(3):
        assert run(*command, str(out)) == 130
    assert (out / "checkpoint").is_dir()
    assert run("prune", *QUICK, "--epochs", "0.1", "--out", str(out)) == 2
    assert "another run" in capsys.readouterr().err
    assert run(*command, str(out)) == 0
    assert [content_of(path) for path in (tmp_path / "cache").iterdir()] == [trained]
    first, second = (content_of(tmp_path / name / "model.safetensors") for name in ("undisturbed", "stopped"))
    assert first == second
    assert not (out / "checkpoint").exists()


def test_fine_tuning_that_was_stopped_goes_on(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = ["finetune", *TUNE, "--checkpoint", saved, "--json", "--out"]
    assert run(*command, str(tmp_path / "undisturbed")) == 0
    expected = json.loads(capsys.readouterr().out)
    calls: list[str] = []

    def stops(kind: str, at: int, function: Any) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            calls.append(kind)
            if calls.count(kind) == at:
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return counted

    monkeypatch.setattr(commands, "finetune", stops("training", 1, commands.finetune))
    monkeypatch.setattr(commands, "evaluate", stops("evaluation", 2, commands.evaluate))
    out = tmp_path / "stopped"
    assert run(*command, str(out)) == 130  # about to train
    assert run(*command, str(out)) == 130  # about to evaluate what was trained
    trained = (out / "checkpoint" / "training.safetensors").read_bytes()
    for other in (["--objective", "trades"], ["--train-attack", "pgd-1"], ["--test-images", "30"]):
        assert run(*command, str(out), *other) == 2
        assert f"tp-mrs: out: {out / 'checkpoint'}" in (error := capsys.readouterr().err)
        assert "is of another run" in error
    assert (out / "checkpoint" / "training.safetensors").read_bytes() == trained
    assert run(*command, str(out)) == 0
    assert calls == [
        "evaluation",
        "training",
        "training",
        "evaluation",
        "training",
        "training",
        "training",
        "evaluation",
    ]
    found = json.loads(capsys.readouterr().out)
    for record in (expected, found):
        for each in (record["before"], record["after"]):
            del each["latency_ms"]
    assert (found["before"], found["after"]) == (expected["before"], expected["after"])
    assert sorted(path.name for path in out.iterdir()) == sorted(commands.FINETUNED)
