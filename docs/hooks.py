"""What mkdocs calls while it builds the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PLOTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks/results").glob("*.png"))
BORROWED = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", *PLOTS)
"""Files from outside that are pages, or on them, under the same names, so that links between them hold."""


def on_files(files: Files, config: Any) -> Files:
    """Add the borrowed files to those of this folder."""
    for name in BORROWED:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files
