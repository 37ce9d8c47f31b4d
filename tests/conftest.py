"""Small networks and data that every test file can use."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def randomised(model: nn.Module) -> nn.Module:
    """Random norm parameters and statistics, so that symmetry and zeros hide no mistake."""
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model


def small_resnet() -> nn.Module:
    return randomised(timm.create_model("resnet18", num_classes=4, channels=(8, 12, 16, 20)))


def small_cnn() -> nn.Module:
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(48, 4),
        )
    )


class Bright(nn.Module):
    """Class 1 where the first pixel is above one half."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: Tensor) -> Tensor:
        score = self.scale * (images[:, 0, 0, 0] - 0.5)
        return torch.stack([-score, score], dim=1)


def image_batches(count: int = 2, size: int = 6, side: int = 32, classes: int = 4) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.rand(size, 3, side, side, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(count)
    ]


@pytest.fixture
def cnn() -> nn.Module:
    return small_cnn()


@pytest.fixture
def resnet() -> nn.Module:
    return small_resnet()


@pytest.fixture
def batches() -> Batches:
    return image_batches()


@pytest.fixture
def example() -> Tensor:
    return torch.rand(1, 3, 32, 32)


Unchanged = Callable[..., object]


@contextmanager
def unchanged(model: nn.Module, *, weights: bool = True) -> Iterator[None]:
    """Fail if the block leaves a trace in the model (weights optionally aside) or in the random state."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 4 != 1)
        parameter.grad = torch.full_like(parameter, float(index)) if index % 2 else None
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [None if gradient is None else gradient.clone() for gradient in gradients]
    attributes = [set(vars(module)) for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    yield
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for parameter, gradient, value in zip(model.parameters(), gradients, values, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, value)  # type: ignore[arg-type]
    assert [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
    ] == hooks
    if weights:
        after = model.state_dict()
        assert all(torch.equal(state[name], after[name]) for name in state)
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert random.getstate() == rng[1]
    assert np.random.get_state()[1].tolist() == rng[2]  # type: ignore[index]


def run_python_blocks(page: Path, count: int | None = None) -> dict[str, Any]:
    """Run a page's Python as it is written, all or the first blocks of it; returns the names that it leaves."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[:count]:
        exec(compile(block, str(page), "exec"), names)  # noqa: S102 (our own pages)
    return names


def torchrun(*command: str, cwd: Path, timeout: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script with its arguments, or `-m MODULE` with its own, in two processes without a GPU."""
    root = str(Path(__file__).parents[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    always = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launch, *command],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=os.environ | always | environment,
    )


def in_two_processes(text: str, folder: Path, *arguments: str, timeout: int = 600) -> list[Any]:
    """What two processes write as JSON to `folder/0.json` and `folder/1.json`, whose script gets the folder last."""
    script = folder / "script.py"
    script.write_text(text)
    done = torchrun(str(script), *arguments, str(folder), cwd=Path(__file__).parents[1], timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]
