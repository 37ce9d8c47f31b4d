"""What mkdocs calls while it builds the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
PLOTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks/results").glob("*.png"))
BORROWED = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", *PLOTS)
"""Files from outside that are pages, or on them, under the same names, so that links between them hold."""

EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))
"""Scripts with cell markers; each is a page, too."""

CELL = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the borrowed files, and the pages made from examples, to those of this folder."""
    from mkdocs.structure.files import File  # here, as the tests do without mkdocs

    for name in BORROWED:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for script in EXAMPLES:
        content = page_of(script.read_text(encoding="utf-8"), script.name)
        files.append(File.generated(config, f"examples/{script.stem}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between this folder and borrowed ones, which in the repository lie beside it, and on the site within it."""
    if page.file.src_uri.startswith("benchmarks/"):
        return markdown.replace("](../docs/", "](../")
    return markdown if "/" in page.file.src_uri else markdown.replace("](../benchmarks/", "](benchmarks/")


def page_of(script: str, name: str) -> str:
    """A script with cell markers as Markdown: its text, a block of Python for each other cell, and a link to it."""
    _, *parts = CELL.split(script)
    cells = [
        re.sub("^# ?", "", text, flags=re.MULTILINE).strip() if kind else f"```python\n{text.strip()}\n```"
        for kind, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    note = f"*This page is a script, [{name}]({name}). Editors that know cell markers open it as a notebook.*"
    return "\n\n".join([*cells, "---", note, ""])
