"""Put generated text into the README files, and say where results come from."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tp_mrs._version import versions
from tp_mrs.errors import InputError
from tp_mrs.files import write_bytes

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Versions, commit and the device that was used, for every result."""
    cpu = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {
        "versions": {**versions(), "python": platform.python_version()},
        "commit": _commit(),
        "device": cpu if device == "cpu" else torch.cuda.get_device_name(device),
    }


@lru_cache
def _commit() -> str | None:
    """Of the checkout, `-dirty` if files were changed after it; None outside of one."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table: the first column to the left, the others, which hold numbers, to the right."""
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def fill(name: str, text: str, *paths: Path) -> None:
    """Replace what stands between `<!-- begin NAME … -->` and `<!-- end NAME -->` in each file."""
    for path in paths or (FOLDER / "README.md",):
        before, begin, rest = path.read_text(encoding="utf-8").partition(f"<!-- begin {name}")
        opening, close, rest = rest.partition("-->")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        if not (begin and close and end):
            raise InputError(f"path: {path} has no <!-- begin {name} --> … <!-- end {name} -->")
        write_bytes(path, f"{before}{begin}{opening}{close}\n\n{text}\n\n{end}{after}".encode())
