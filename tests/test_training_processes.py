"""Fine-tuning by two processes: one pass over the data by both together, the same weights as with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tp_mrs.checkpoints
from tests.conftest import Batches, image_batches, in_two_processes
from tp_mrs import InputError, finetune
from tp_mrs.processes import place


def net(*, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = (nn.BatchNorm2d(4), nn.Dropout(0.2)) if norm else ()
    return nn.Sequential(nn.Conv2d(3, 4, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def trained(model: nn.Module, data: Any, **arguments: Any) -> dict[str, Any]:
    """What came of it, or the error, as JSON."""
    settings: dict[str, Any] = {"objective": "trades", "attack": "fgsm", "eps": 0.05, "lr": 0.1, "progress": False}
    try:
        result = finetune(model, data, **{**settings, **arguments})
    except InputError as error:
        return {"error": str(error)}
    weights = [tensor.flatten().tolist() for tensor in model.state_dict().values()]
    history = [[epoch.epoch, epoch.images, epoch.loss, epoch.clean, epoch.robust] for epoch in result.history]
    return {"weights": weights, "history": history, "steps": result.settings["steps"]}


def batches(size: int) -> Batches:
    images, labels = (torch.cat(part) for part in zip(*image_batches(7, size=4, side=8), strict=True))
    return list(zip(images.split(size), labels.split(size), strict=True))


def loader(size: int, **arguments: Any) -> DataLoader[Any]:
    images, labels = (torch.cat(part) for part in zip(*batches(4), strict=True))
    return DataLoader(
        TensorDataset(images[:27], labels[:27]),
        size,
        shuffle=True,
        generator=torch.Generator().manual_seed(place()[0]),
        **arguments,
    )


def as_list(folder: Path) -> dict[str, Any]:
    return trained(net(), batches(4), epochs=2, accumulate=2, ema=0.5, validation_data=batches(6), log=folder / "log")


def shuffled(folder: Path) -> dict[str, Any]:
    return trained(net(), loader(4 // place()[1]), epochs=2, optimizer="adamw")


def own_order(folder: Path) -> dict[str, Any]:
    """The global random state decides; every image is seen once."""
    data = loader(3)
    data.generator = data.sampler.generator = None  # type: ignore[attr-defined]
    return {"images": torch.cat([images for images, _ in Seen(data)]).flatten(1).sum(1).tolist()}


class Seen:
    """The batches of one pass of this process."""

    def __init__(self, data: Any) -> None:
        from tp_mrs.passes import Passes

        self.passes = Passes(data, seed=0, device=torch.device("cpu"))

    def __iter__(self) -> Any:
        torch.manual_seed(place()[0])
        return (next(self.passes) for _ in range(self.passes.batches))


class StopError(Exception):
    pass


def undisturbed(folder: Path, **arguments: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"objective": "pgd", "attack": "pgd-2", "epochs": 2, "validation_data": batches(6)}
    return trained(net(norm=True), loader(2), **settings, **arguments)


def interrupted(folder: Path) -> dict[str, Any]:
    write = tp_mrs.checkpoints.Checkpoint.write
    for stop in (2, 1, 0):
        written = iter(range(1, 100))

        def stops(self: Any, state: Any, stop: int = stop, written: Any = written) -> None:
            write(self, state)
            if next(written) == stop:
                raise StopError

        tp_mrs.checkpoints.Checkpoint.write = stops  # type: ignore[method-assign]
        try:
            result = undisturbed(folder, checkpoint=folder / "run.safetensors", checkpoint_every=3)
        except StopError:
            continue
        finally:
            tp_mrs.checkpoints.Checkpoint.write = write  # type: ignore[method-assign]
    return result


def starved(folder: Path) -> dict[str, Any]:
    return trained(net(), batches(4)[:1])


def prepared(folder: Path) -> dict[str, Any]:
    from accelerate import Accelerator

    return trained(net(), Accelerator(cpu=True).prepare(loader(4)))


def broken(folder: Path) -> dict[str, Any]:
    data = batches(4)
    data[3] = (data[3][0] + 1, data[3][1])
    return trained(net(), data)


def idle(folder: Path) -> dict[str, Any]:
    model = net()
    model.register_parameter("extra", nn.Parameter(torch.ones(2)))
    return trained(model, batches(4))


MODES: tuple[Callable[[Path], dict[str, Any]], ...] = (
    as_list,
    shuffled,
    own_order,
    undisturbed,
    interrupted,
    starved,
    prepared,
    broken,
    idle,
)
SCRIPT = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from tp_mrs.processes import join
from tests.test_training_processes import MODES

join()  # as finetune does by itself
state = PartialState()
folder = Path(sys.argv[1])
found = {mode.__name__: mode(folder) for mode in MODES}
(folder / f"{state.process_index}.json").write_text(json.dumps(found))
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes found in each mode."""
    return in_two_processes(SCRIPT, folder)


pytestmark = pytest.mark.slow


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["steps"] == expected["steps"]
    for epoch, other in zip(found["history"], expected["history"], strict=True):
        assert [value is None for value in epoch] == [value is None for value in other]
        assert [value or 0 for value in epoch] == pytest.approx([value or 0 for value in other], rel=1e-4)
    for weights, others in zip(found["weights"], expected["weights"], strict=True):
        assert weights == pytest.approx(others, abs=1e-5)


def test_a_list_whose_first_batch_fills_up_the_last_round(found: list[dict[str, Any]], folder: Path) -> None:
    data = [*batches(8)[:3], tuple(torch.cat(part) for part in zip(batches(4)[6], batches(4)[0], strict=True))]
    expected = trained(net(), data, epochs=2, accumulate=2, ema=0.5, validation_data=batches(6))
    for process in found:
        check_same(process["as_list"], expected)
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    assert [(line["epoch"], line["images"]) for line in lines] == [(1, 32), (2, 32)]


def test_a_shuffled_loader_with_another_generator_in_each_process(found: list[dict[str, Any]], folder: Path) -> None:
    expected = shuffled(folder)
    assert expected["history"][0][1] == 27
    for process in found:
        check_same(process["shuffled"], expected)


def test_each_image_is_seen_once(found: list[dict[str, Any]]) -> None:
    images = torch.cat([images for images, _ in batches(4)])[:27].flatten(1).sum(1)
    first, second = (process["own_order"]["images"] for process in found)
    assert (len(first), len(second)) == (15, 15)  # nine batches; the first comes again
    assert sorted({*first, *second}) == pytest.approx(sorted(images.tolist()))


def test_an_interrupted_run_ends_the_same(found: list[dict[str, Any]]) -> None:
    assert found[0]["interrupted"] == found[0]["undisturbed"] == found[1]["interrupted"] == found[1]["undisturbed"]
    assert "weights" in found[0]["interrupted"]


def test_refusals(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert process["starved"]["error"].startswith("train_data: 1 batches are too few for 2 processes")
        assert process["idle"]["error"].startswith(
            "model: the loss does not depend on extra, so that several processes"
        )
        assert process["prepared"]["error"].startswith("train_data: this loader has been split between processes")
    assert found[1]["broken"]["error"].startswith("train_data: images: expected values in [0, 1]")
    assert found[0]["broken"]["error"] == f"process 1: {found[1]['broken']['error']}"
