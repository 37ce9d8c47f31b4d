"""Measuring with two processes, each with half of the batches: the same scores as with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks

from tests.conftest import in_two_processes, small_cnn
from tp_mrs.measuring import measure

SCRIPT = """
import json, sys
from pathlib import Path

import torchattacks
from accelerate import Accelerator, PartialState

import tp_mrs
from tests.test_processes import batches, model
from tp_mrs.measuring import measure

mode, folder = sys.argv[1], Path(sys.argv[2])
state = PartialState(cpu=True)
data = batches()
if mode == "starved":
    data = data[:1]
if mode == "broken" and state.process_index == 1:
    data[1] = (data[1][0] * 2, data[1][1])
if mode == "prepared":
    import torch
    images, labels = (torch.cat(part) for part in zip(*data))
    dataset = torch.utils.data.TensorDataset(images, labels)
    data = Accelerator(cpu=True).prepare(torch.utils.data.DataLoader(dataset, batch_size=5))
try:
    found = measure(model(), data, torchattacks.VANILA if mode == "prepared" else torchattacks.PGD,
                    estimator="pga" if mode == "pga" else "first_order", steps=2, moments=True)
    result = {"modules": found.modules, "loss": found.robust_loss, "accuracy": found.robust_accuracy,
              "blocks": found.blocks, "gradient": float(found.gradients["0.weight"].norm()),
              "moments": found.moments["3"].sum(dim=0).tolist()}
except tp_mrs.InputError as error:
    result = {"error": str(error)}
(folder / f"{state.process_index}.json").write_text(json.dumps(result))
state.wait_for_everyone()
state.destroy_process_group()
"""


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return small_cnn()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.rand(5, 3, 12, 12, generator=generator), torch.randint(4, (5,), generator=generator)) for _ in range(4)
    ]


@pytest.mark.parametrize("mode", ["first_order", "pga"])
def test_two_processes_find_what_one_finds(mode: Any, tmp_path: Path) -> None:
    one = measure(model(), batches(), torchattacks.PGD, estimator=mode, steps=2, moments=True)
    found, other = in_two_processes(SCRIPT, tmp_path, mode, timeout=120)
    assert found == other
    assert found["modules"] == pytest.approx(one.modules, rel=1e-5)
    assert found["loss"] == pytest.approx(one.robust_loss, rel=1e-6)
    assert found["accuracy"] == one.robust_accuracy
    assert found["gradient"] == pytest.approx(float(one.gradients["0.weight"].norm()), rel=1e-5)
    assert sum(found["blocks"]) == 20
    torch.testing.assert_close(torch.tensor(found["moments"]), one.moments["3"].sum(dim=0).float())


def test_a_loader_that_accelerate_has_split(tmp_path: Path) -> None:
    for result in in_two_processes(SCRIPT, tmp_path, "prepared", timeout=120):
        assert result["error"].startswith("data: accelerate has prepared this loader")


def test_too_few_batches(tmp_path: Path) -> None:
    found, other = in_two_processes(SCRIPT, tmp_path, "starved", timeout=120)
    assert other["error"] == "data: no batch for process 1 of 2; use smaller batches or fewer processes"
    assert found["error"] == f"process 1: {other['error']}"


def test_one_process_fails(tmp_path: Path) -> None:
    found, other = in_two_processes(SCRIPT, tmp_path, "broken", timeout=120)
    assert other["error"].startswith("images: expected values in [0, 1]")
    assert found["error"] == f"process 1: {other['error']}"
