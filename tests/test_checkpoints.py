"""Fine-tuning that is interrupted and started again ends as if nothing had happened; other files are refused."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tp_mrs.checkpoints
from tests.conftest import Batches, image_batches, unchanged
from tp_mrs import DivergenceError, Finetuning, InputError, finetune
from tp_mrs.checkpoints import Checkpoint
from tp_mrs.objectives import adversarial


class Noisy(Dataset[Any]):
    """Images that are drawn with new noise each time."""

    def __init__(self) -> None:
        (self.images, self.labels), *_ = image_batches(1, size=14, side=8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return (image + 0.1 * torch.rand_like(image) + 0.01 * random.random()).clamp(0, 1), self.labels[index]


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 4)
    )


def loader(**arguments: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(), 2, shuffle=True, **arguments)


def own_generator() -> DataLoader[Any]:
    return loader(generator=torch.Generator().manual_seed(5))


def weighted() -> DataLoader[Any]:
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 7 + [2.0] * 7, 14)
    return DataLoader(Noisy(), 2, sampler=sampler)


def replaced() -> DataLoader[Any]:
    """Draws its order bit by bit, while the images are read."""
    sampler = torch.utils.data.RandomSampler(
        range(40), replacement=True, num_samples=70, generator=torch.Generator().manual_seed(3)
    )
    return DataLoader(torch.utils.data.ConcatDataset([Noisy()] * 3), 10, sampler=sampler)


def working() -> DataLoader[Any]:
    return loader(num_workers=1)


def as_list() -> Batches:
    return image_batches(7, size=2, side=8)


RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (loader, {"accumulate": 2, "clip_norm": 0.5}),
    "adamw": (own_generator, {"optimizer": "adamw", "lr": 0.01, "accumulate": 2, "channels_last": True}),
    "adafactorbv": (loader, {"optimizer": "adafactorbv", "lr": 0.01}),  # its state has types of numbers
    "awp": (weighted, {"objective": "trades-awp", "attack": "tpgd-2"}),
    "replaced": (replaced, {"objective": "mart", "attack": "pgd-2"}),
    "workers": (working, {"objective": "standard"}),
    "list": (as_list, {"objective": "fgsm", "epochs": 2.5, "ema": 0.6}),
    "validated": (own_generator, {"validation_data": image_batches(2, size=8, side=8), "validation_attack": "pgd-2"}),
    "averaged": (loader, {"validation_data": image_batches(1, size=8, side=8), "ema": 0.8, "patience": 2, "lr": 0.5}),
}
COMMON: dict[str, Any] = {"attack": "pgd-2", "epochs": 3, "eps": 0.03, "progress": False, "checkpoint_every": 2}


def train(name: str, **arguments: Any) -> tuple[Finetuning, dict[str, Tensor]]:
    make, own = RUNS[name]
    model = small_net()
    result = finetune(model, make(), **COMMON | own | arguments)
    return result, model.state_dict()


def same(found: tuple[Finetuning, dict[str, Tensor]], expected: tuple[Finetuning, dict[str, Tensor]]) -> bool:
    return found[0] == expected[0] and all(torch.equal(found[1][key], value) for key, value in expected[1].items())


class StopError(Exception):
    pass


def stopping(after: int) -> Any:
    """An objective like `"pgd"`, in name too, that stops the run at its so many-th call; 0 for never."""
    calls = iter(range(1, 1000))

    def objective(model: nn.Module, images: Tensor, labels: Tensor, attack: Any) -> Tensor:
        if next(calls) == after:
            raise StopError
        return adversarial(model, images, labels, attack)

    return objective


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("awp", "replaced", "workers")])
def test_a_run_that_stops_and_starts_again_ends_the_same(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = train(name, objective=stopping(0))
    path = tmp_path / "run.safetensors"
    for after in (6, 5, 4, 7):  # calls from the start or the last checkpoint on
        torch.manual_seed(after)  # the caller's random state is of no account
        with pytest.raises(StopError):
            train(name, objective=stopping(after), checkpoint=path)
    with caplog.at_level("INFO", logger="tp_mrs.finetuning"):
        assert same(train(name, objective=stopping(0), checkpoint=path), expected)
    assert re.search(r"going on from .* after \d+ of \d+ batches", caplog.text)
    assert same(train(name, objective=stopping(1), checkpoint=path), expected), "trained again"


@pytest.mark.parametrize("name", ["awp", "replaced", "workers"])
def test_other_objectives_and_orders(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(name)
    path = tmp_path / "run.safetensors"
    write, written = tp_mrs.checkpoints.Checkpoint.write, iter(range(100))

    def stops(self: Any, state: Any) -> None:
        write(self, state)
        if next(written) in (1, 3, 8):  # within an epoch, at its end, and within the next
            raise StopError

    monkeypatch.setattr(tp_mrs.checkpoints.Checkpoint, "write", stops)
    for _ in range(3):
        with pytest.raises(StopError):
            train(name, checkpoint=path)
    assert same(train(name, checkpoint=path), expected)


def test_the_loaders_generator_goes_on_where_the_run_left_it(tmp_path: Path) -> None:
    states = []
    for _ in range(2):  # the second time the finished run is only read
        data = own_generator()
        finetune(small_net(), data, **COMMON, objective="standard", checkpoint=tmp_path / "run.safetensors")
        states.append(data.generator.get_state())
    assert torch.equal(*states)
    assert not torch.equal(states[0], own_generator().generator.get_state())


def test_a_copy_of_a_run_goes_on_with_the_copy_of_its_log(tmp_path: Path) -> None:
    def files(folder: str) -> dict[str, Path]:
        return {"checkpoint": tmp_path / folder / "run.safetensors", "log": tmp_path / folder / "log.jsonl"}

    with pytest.raises(StopError):
        train("list", objective=stopping(10), **files("here"))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    result, _ = train("list", objective=stopping(0), **files("there"))
    lines = files("there")["log"].read_text().splitlines()
    assert [json.loads(line) for line in lines] == [vars(epoch) for epoch in result.history]


SCRIPT = """
import sys
import safetensors.torch
from tests.test_checkpoints import train

result, weights = train("validated", checkpoint=sys.argv[1], log=sys.argv[2], checkpoint_every=1)
safetensors.torch.save_file(weights, sys.argv[3])
"""


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_ends_the_same(tmp_path: Path) -> None:
    _, expected = train("validated")
    checkpoint, log, weights = (tmp_path / name for name in ("run.safetensors", "log.jsonl", "weights.safetensors"))
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), str(log), str(weights)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it in their last bits
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **threads}
    killed = 0
    for moment in range(40):
        running = subprocess.Popen(command, env=environment)
        seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while running.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen):
            time.sleep(0.001)
        time.sleep(random.random() * 0.1 * (moment % 3))
        if running.poll() is None and moment < 6:
            running.send_signal(signal.SIGKILL)
            killed += 1
        if running.wait() == 0:
            break
    assert killed >= 3
    found = safetensors.torch.load_file(weights)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [1, 2, 3]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of an unfinished run."""
    path = tmp_path / "run.safetensors"
    with pytest.raises(StopError):
        train("list", objective=stopping(4), checkpoint=path)
    return path


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"lr": 0.1}, "lr is 0.05 there, 0.1 here"),
        ({"objective": "trades"}, "objective is 'objective' there, 'trades' here"),
        ({"attack": "pgd-3"}, "attack is .*steps=2.* there, .*steps=3.* here"),
        ({"ema": None}, "ema is 0.6 there, None here"),
        ({"epochs": 3}, "epochs is 2.5 there, 3 here"),
        ({"data": image_batches(6, size=2, side=8)}, "batches of train_data is 7 there, 6 here"),
        (
            {"data": DataLoader(TensorDataset(*map(torch.cat, zip(*as_list(), strict=True))), 2)},
            "type of train_data is",
        ),
        ({"model": small_net().append(nn.Linear(4, 4))}, "the number of trainable tensors is 6 there, 8 here"),
        ({"model": nn.Sequential(*small_net()[:-1], nn.Linear(144, 5))}, "the shape of 5.bias is .4. there, .5. here"),
        ({"model": nn.Sequential(*small_net()[:-1], nn.Linear(144, 4))}, "the checksum of the initial weights is"),
    ],
)
def test_a_checkpoint_of_another_run(arguments: dict[str, Any], difference: str, path: Path) -> None:
    model, data = arguments.pop("model", small_net()), arguments.pop("data", as_list())
    before = path.read_bytes()
    settings = COMMON | RUNS["list"][1] | {"objective": stopping(0)} | arguments
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=f"checkpoint: .* is of another run: {difference}.*; choose another path, or"):
        finetune(model, data, checkpoint=path, **settings)
    assert path.read_bytes() == before
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters() if parameter.grad is not None)


def test_a_checkpoint_of_other_processes_says_so_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("finetuning", "passes"):
        monkeypatch.setattr(f"tp_mrs.{module}.place", lambda: (0, 2))
    with pytest.raises(InputError, match="is of another run: the number of processes is 1 there, 2 here"):
        train("list", objective=stopping(0), checkpoint=path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "pickle", "model"])
def test_a_file_that_is_damaged_or_no_checkpoint(damage: str, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    damaged: dict[str, bytes | bytearray] = {
        "cut": content[:-50],
        "flipped": content,
        "other": b"{}",
        "pickle": b"PK\x03\x04abc",
    }
    if damage == "model":
        tp_mrs.save(small_net(), path)
    else:
        path.write_bytes(damaged[damage])
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"checkpoint: .*unusable.*; choose another path, or delete it"):
        train("list", objective=stopping(0), checkpoint=path)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_checkpoint_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("tp_mrs.files.os.fsync", full)
        with pytest.raises(InputError, match=r"^checkpoint: cannot write .*No space left.*is intact"):
            train("list", objective=stopping(0), checkpoint=path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert same(train("list", objective=stopping(0), checkpoint=path), train("list", objective=stopping(0)))


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    file = Checkpoint(tmp_path / "state.safetensors", {})
    state = {"a": (3, (1, None), [2.5]), "b": torch.bfloat16, "tuple": {"x": ()}, "dtype": "F32", "c": [{"tuple": 1}]}
    file.write({**state, "tensor": {"tensor": torch.ones(2)}})
    found = file.read()
    assert torch.equal(found.pop("tensor")["tensor"], torch.ones(2))
    assert found == state


def test_a_folder_that_cannot_be_written(batches: Batches, tmp_path: Path) -> None:
    model = small_net()
    for place, message in ((Path("/dev/null/run.safetensors"), "cannot write to /dev/null"), (tmp_path, "is a folder")):
        with unchanged(model), pytest.raises(InputError, match=f"checkpoint: .*{message}"):
            finetune(model, as_list(), checkpoint=place)


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_a_state_that_is_not_finite_is_never_written(where: str, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    calls = iter(range(1, 1000))
    model = small_net()

    def explodes(model: Any, images: Tensor, labels: Tensor, attack: Any) -> Tensor:
        loss = model(images).square().mean()
        if next(calls) < 12:
            return loss
        if where == "weights":  # a finite loss with a gradient that is not
            return loss + 0 * (model[5].weight.sum() * 0).sqrt()
        return loss * float("nan")

    arguments: dict[str, Any] = {"objective": explodes, "epochs": 3, "clip_norm": None, "checkpoint_every": 1}
    with pytest.raises(DivergenceError, match=r"(batch 1\d of 21.*run.safetensors holds the last good state)"):
        finetune(model, as_list(), checkpoint=path, **arguments)
    _, tensors = tp_mrs.tensorfile.read(path, format=tp_mrs.checkpoints.FORMAT)
    assert all(bool(torch.isfinite(tensor).all()) for name, tensor in tensors.items() if ".model." in name)


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    old, new, other = (tmp_path / name for name in (".run.safetensors.a.part", ".run.safetensors.b.part", ".x.c.part"))
    for file in (old, new, other):
        file.write_bytes(b"half")
    for file in (old, other):
        os.utime(file, (0, 0))
    train("list", objective=stopping(0), checkpoint=path)
    assert {each.name for each in tmp_path.iterdir()} == {path.name, new.name, other.name}
