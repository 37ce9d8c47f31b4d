"""The README's Python runs as it is written, one block after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import run_python_blocks

README = Path(__file__).parents[1] / "README.md"


def test_every_python_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_python_blocks(README)
    assert names["small"](names["example_inputs"]).shape == (1, 10)
