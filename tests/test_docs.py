"""The documentation: its Python runs; messages, numbers, options and picture are those of the code and the results."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import tp_mrs
from docs import command_line, gallery, picture
from tests.conftest import run_python_blocks
from tp_mrs.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


PAGES = [*DOCS.rglob("*.md"), ROOT / "CONTRIBUTING.md"]
WITH_PYTHON = sorted(page for page in PAGES if "```python" in read(page))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_every_python_block(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python_blocks(page)


def texts(source: str) -> Iterator[str]:
    """Every text in Python source, with … for each part that varies."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield re.sub("…+", "…", "".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub("%[sd]", "…", node.value)


def test_texts() -> None:
    assert next(texts('f"a {b}{c:.1f} d" "e"')) == "a … de"
    assert next(texts('"a %s" " b"')) == "a … b"


def test_messages_are_those_of_the_source() -> None:
    package = Path(tp_mrs.__file__).parent
    source = "\n".join(text for file in package.rglob("*.py") for text in texts(read(file)))
    ours, _, _ = read(DOCS / "troubleshooting.md").partition("## Installing")
    messages = re.findall(r"^#### `(.*)`$", ours, re.MULTILINE)
    assert len(messages) > 50
    assert [message for message in messages if message.removesuffix("…") not in source] == []


def test_the_map_of_the_package_is_whole() -> None:
    _, _, rest = read(ROOT / "CONTRIBUTING.md").partition("## Where things are")
    section, _, _ = rest.partition("\n## ")
    modules = {path.stem for path in Path(tp_mrs.__file__).parent.rglob("*.py")} - {"__init__", "__main__"}
    named = re.findall(r"`(\w+)`", section)
    assert sorted(named) == sorted([*modules, "cli"])


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(read(page) for page in (DOCS / "reference").glob("*.md"))
    assert set(tp_mrs.__all__) <= set(re.findall(r"^::: tp_mrs\.(\w+)$", pages, re.MULTILINE))


def test_every_command_is_there_with_its_options(tmp_path: Path) -> None:
    page = Path(shutil.copy(command_line.PAGE, tmp_path))
    command_line.write(page)
    assert read(page) == read(command_line.PAGE), "run python -m docs.command_line"
    assert re.findall(r"^## `tp-mrs (\w+)`$", read(page), re.MULTILINE) == list(COMMANDS)


def test_the_picture_is_that_of_the_results() -> None:
    assert picture.drawing() == read(picture.PICTURE), "run python -m docs.picture"


def test_the_gallery_shows_every_picture() -> None:
    shown = re.findall(r"\]\(images/gallery/([\w.]+)\)", read(DOCS / "gallery.md"))
    assert sorted(shown) == sorted(path.name for path in gallery.GALLERY.iterdir())


@pytest.mark.slow
def test_the_gallery_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gallery.draw(tmp_path / "drawn")
    drawn = {path.name: read(path) for path in (tmp_path / "drawn").iterdir()}
    assert set(drawn) == {path.name for path in gallery.GALLERY.iterdir()}
    for content in drawn.values():
        assert content.rstrip().endswith(("</svg>", "</html>"))
        assert str(tmp_path) not in content
    assert "ms, one image" not in drawn["report.html"]


def test_numbers_are_those_of_the_benchmarks() -> None:
    page = re.sub(r"```.*?```", "", read(DOCS / "choosing.md"), flags=re.DOTALL)
    benchmarks = read(ROOT / "benchmarks/README.md")
    numbers = re.findall(r"\b\d+\.\d+\b", page)
    assert len(numbers) > 50
    assert [number for number in numbers if not re.search(rf"\b{re.escape(number)}\b", benchmarks)] == []
