"""The README's Python runs as it is written, one block after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

from tests.conftest import run_python_blocks

README = Path(__file__).parents[1] / "README.md"


def test_every_python_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_python_blocks(README)
    assert names["small"](names["example_inputs"]).shape == (1, 10)


def test_the_changed_line_prunes() -> None:
    names = run_python_blocks(README, count=1)
    dense, pruned = timm.create_model("resnet18", num_classes=10), names["model"]
    left = [sum(parameter.numel() for parameter in model.parameters()) for model in (pruned, dense)]
    assert left[0] < 0.5 * left[1]
    assert pruned(names["example_inputs"]).shape == (1, 10)
