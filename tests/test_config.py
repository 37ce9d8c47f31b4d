"""Options from a file: the command line goes first, and what is wrong is named before anything happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tp_mrs import InputError
from tp_mrs.cli.arguments import parse
from tp_mrs.cli.config import check_same_run, write_config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def parsed(text: str, file: Path, *argv: str, command: str = "prune") -> dict[str, Any]:
    file.write_text(text)
    return vars(parse([command, "--config", str(file), *argv]))


def test_options_of_every_kind(file: Path) -> None:
    text = """
    batch-size: 64
    lr: 1e-3
    eps: 0.1
    quiet: true
    attacks: [none, pgd-20x5]
    model: vgg11
    model_kwargs: {channels: [8, 16]}
    round_to:
    precision: fp32
    """
    found = parsed(text, file)
    wanted: dict[str, Any] = {
        "batch_size": 64,
        "lr": 0.001,
        "eps": "0.1",
        "quiet": True,
        "attacks": ["none", "pgd-20x5"],
    }
    wanted |= {"model": "vgg11", "model_kwargs": {"channels": [8, 16]}, "round_to": None, "precision": "fp32"}
    assert found.items() >= wanted.items()
    assert found["rounds"] == 1
    assert "config" not in found


def test_results_of_another_run_are_not_replaced(tmp_path: Path) -> None:
    write_config(tmp_path / "run.yaml", parse(["prune", "--macs", "0.5", "--lr", "1e-3", "--model-kwargs", "depth=3"]))
    same = ["--macs", "0.5", "--lr", "0.001", "--model-kwargs", "depth=3", "--quiet", "--out", str(tmp_path)]
    check_same_run(tmp_path, parse(["prune", *same]))
    check_same_run(tmp_path / "elsewhere", parse(["evaluate"]))
    message = r"^out: .* has the results of a run with macs 0.5 \(here 0.7\); choose another folder, or remove it$"
    with pytest.raises(InputError, match=message):
        check_same_run(tmp_path, parse(["prune", *same, "--macs", "0.7"]))
    with pytest.raises(InputError, match=r"^out: .* has the results of tp-mrs prune; choose another"):
        check_same_run(tmp_path, parse(["evaluate", "--out", str(tmp_path)]))


def test_the_command_line_wins(file: Path) -> None:
    text = "lr: 0.1\nseed: 3\nmacs: 0.5\nmodel: vgg11\nmodel-kwargs: {depth: 3}\njson: true\n"
    found = parsed(text, file, "--lr", "0.2", "--params", "0.4", "--model", "resnet18", "--no-json")
    wanted: dict[str, Any] = {
        "lr": 0.2,
        "seed": 3,
        "macs": None,
        "params": 0.4,
        "model": "resnet18",
        "model_kwargs": {},
        "json": False,
    }
    assert found.items() >= wanted.items()


def test_json_and_positional_arguments(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert parsed(json.dumps({"checkpoint": "a.pt2"}, indent="\t"), file, command="export")["checkpoint"] == "a.pt2"
    assert parsed('{"checkpoint": "a"}', file, "b", command="export")["checkpoint"] == "b"


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("prune", []),
        ("prune", ["--data", "cifar10", "--eps", "8/255", "--params", "0.3", "--quiet", "--out", "a: b é"]),
        ("prune", ["--model-kwargs", "channels=8,16", "act_layer=silu", "--attacks", "fgsm", "none"]),
        ("finetune", ["--checkpoint", "1.safetensors", "--ema", "0.999", "--objective", "trades-awp"]),
        ("sensitivity", ["--lr", "1e-5", "--steps", "3"]),
    ],
)
def test_what_is_written_is_read_as_it_was(command: str, argv: list[str], file: Path) -> None:
    arguments = parse([command, *argv])
    write_config(file, arguments)
    assert parse([command, "--config", str(file)]) == arguments
    other = "evaluate" if command == "prune" else "prune"
    with pytest.raises(InputError, match=f"command: .* is for tp-mrs {command}, not for tp-mrs {other}"):
        parse([other, "--config", str(file)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"config: .* has 'epoch', which is no option of tp-mrs prune; did you mean 'epochs'\?"),
        ("config: a.yaml", "has 'config', which is no option"),
        ("1: 2", "has 1, which is no option of tp-mrs prune; see tp-mrs prune --help"),
        ("min-keep: 0.1\nmin_keep: 0.2", "has 'min-keep' twice"),
        ("epochs: many", r"epochs \(in .*run.yaml\): expected a number, got 'many'"),
        ("epochs: true", "epochs .*: expected a number, got True"),
        ("batch-size: 3.5", "batch-size .*: expected a whole number, got 3.5"),
        ("quiet: 1", "quiet .*: expected true or false, got 1"),
        ("attacks: fgsm", "attacks .*: expected a list, such as"),
        ("attacks: [[fgsm]]", "attacks .*: expected text"),
        ("model-kwargs: [1]", "model-kwargs .*: expected arguments of the model"),
        ("precision: fp8", "precision .*: expected one of fp32, bf16, got 'fp8'"),
        ("data: [digits]", "data .*: expected text"),
        ("data: {digits", r"config: .*run.yaml is not valid YAML \(.*line 1"),
        ("data: !!python/object/apply:os.system [ls]", "is not valid YAML"),
        ("- data", "config: expected .* to hold options, such as epochs: 6, got list"),
    ],
)
def test_bad_files(text: str, message: str, file: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parsed(text, file)
    assert "\n" not in str(caught.value)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config: cannot read .*none.yaml \(No such file"):
        parse(["prune", "--config", str(tmp_path / "none.yaml")])
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        parse(["prune", "--config", str(tmp_path / "a.json")])
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="is not valid YAML"):
        parse(["prune", "--config", str(tmp_path / "a.yaml")])
