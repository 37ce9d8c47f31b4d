"""The command line in two processes: one voice, the results of one process, and no one left waiting."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tp_mrs
from tests.conftest import torchrun
from tp_mrs.cli import commands

FEW = ["--test-images", "300", "--attacks", "fgsm"]
MEASURE = ["--calibration-images", "96", "--seed", "3"]


@pytest.fixture
def saved(tmp_path: Path) -> str:
    torch.manual_seed(0)
    model = tp_mrs.create_model("resnet18", num_classes=10, in_chans=1, image_size=32, channels=(8, 8, 8, 8))
    return str(tp_mrs.save(tp_mrs.normalize(model, [0.3], [0.3]), tmp_path / "saved.safetensors"))


def tp_mrs_twice(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`tp-mrs` with these arguments in two processes."""
    return torchrun("-m", "tp_mrs", *arguments, cwd=folder, timeout=300, TP_MRS_CACHE=str(folder / "cache"))


def printed(*arguments: str, folder: Path) -> dict[str, Any]:
    """The JSON that the first process prints, and nothing else is printed."""
    done = tp_mrs_twice(*arguments, "--json", folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_sensitivity_is_that_of_one_process(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed("sensitivity", *MEASURE, "--checkpoint", saved, "--out", "run", folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "run.yaml",
        "sensitivity.json",
        "sensitivity.png",
        "sensitivity.svg",
    ]
    assert commands.main(["sensitivity", *MEASURE, "--checkpoint", saved, "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert found["modules"] == pytest.approx(one["modules"], rel=1e-5)
    assert found["groups"] == pytest.approx(one["groups"], rel=1e-5)


def test_an_evaluation_is_that_of_one_process(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", *FEW, "--masking", "--checkpoint", saved]
    found = printed(*arguments, folder=tmp_path)
    assert commands.main([*arguments, "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    for evaluation in (found, *found["curve"]):
        assert evaluation.pop("latency_ms") > 0  # measured, so never the same
    for evaluation in (one, *one["curve"]):
        del evaluation["latency_ms"]
    assert found == one


def test_finetune_writes_once(saved: str, tmp_path: Path) -> None:
    arguments = ["finetune", *FEW, "--epochs", "0.1", "--quiet", "--checkpoint", saved, "--out", "run"]
    done = tp_mrs_twice(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Written to run") == done.stdout.count("Change") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(commands.FINETUNED)
    record = json.loads((tmp_path / "run" / "finetuning.json").read_text())
    arguments = ["evaluate", *FEW, "--checkpoint", str(tmp_path / "run" / "model.safetensors")]
    assert record["after"]["outcomes"] == printed(*arguments, folder=tmp_path)["outcomes"]


@pytest.mark.slow
def test_prune_in_rounds(saved: str, tmp_path: Path) -> None:
    arguments = [*FEW, *MEASURE, "--epochs", "0.1", "--rounds", "2", "--checkpoint", saved, "--out", "run"]
    report = printed("prune", *arguments, folder=tmp_path)
    assert report["rounds"][-1]["reached"] == pytest.approx(0.5, abs=0.02)
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    tp_mrs.load(tmp_path / "run" / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--lr", "much"], "argument --lr: invalid float value"),
        (["evaluate", "--device", "cuda:1"], "device: each process takes its own; expected auto, cpu or cuda"),
        (["evaluate", "--checkpoint", "/nowhere.safetensors"], "checkpoint: cannot read /nowhere.safetensors"),
        (["sensitivity", *MEASURE, "--batch-size", "96", "--checkpoint", "SAVED"], "data: no batch for process 1 of 2"),
    ],
)
def test_what_fails_everywhere_is_said_once(arguments: list[str], message: str, saved: str, tmp_path: Path) -> None:
    done = tp_mrs_twice(*(argument.replace("SAVED", saved) for argument in arguments), folder=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count(message) == 1, done.stderr
    assert done.stdout == ""


def test_what_fails_in_one_process_is_said_once(tmp_path: Path) -> None:
    """An image that only one of the processes reads cannot be read."""
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(8):
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    (tmp_path / "train" / "dog" / "3.png").write_bytes(b"no image")
    model = tp_mrs.create_model("resnet18", num_classes=2, image_size=16, channels=(8, 8, 8, 8))
    checkpoint = str(tp_mrs.save(model, tmp_path / "two.safetensors"))
    data = ["--data", "image-folder", "--data-dir", str(tmp_path), "--image-size", "16", "--batch-size", "2"]
    arguments = ["finetune", *FEW, *data, "--epochs", "1", "--checkpoint", checkpoint, "--out", "run"]
    done = tp_mrs_twice(*arguments, folder=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("data: cannot read the image") == 1, done.stderr
    assert "Connection" not in done.stderr
    assert done.stdout == ""
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint"]
