"""The worked examples: pages made of scripts, which run as they are written."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest

from docs.hooks import EXAMPLES, page_of

ROOT = Path(__file__).parents[1]


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the script leaves."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TP_MRS_CACHE", str(folder / "cache"))
    return runpy.run_path(str(ROOT / f"docs/examples/{name}.py"))


def test_a_page_of_cells() -> None:
    script = "# %% [markdown]\n# # Title\n#\n# Text:\n# - `a`\n\n# %%\na = 1  # %% no cell\n\n\n# %%\nb = 2\n"
    page = "# Title\n\nText:\n- `a`\n\n```python\na = 1  # %% no cell\n```\n\n```python\nb = 2\n```\n\n---\n\n"
    assert page_of(script, "x.py").startswith(page)
    assert "[x.py](x.py)" in page_of(script, "x.py")


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_every_example_is_a_page_that_can_be_found(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    page = page_of(text, script.name)
    assert text.startswith("# %% [markdown]\n# # ")
    code = "\n".join(block.partition("\n```")[0] for block in page.split("```python\n")[1:])
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(text))
    for place, link in {
        "mkdocs.yml": f"examples/{script.stem}.md",
        "docs/index.md": f"(examples/{script.stem}.md)",
        "README.md": f"(docs/examples/{script.name})",
    }.items():
        assert link in (ROOT / place).read_text(encoding="utf-8")


@pytest.mark.slow
def test_torch_pruning_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("torch_pruning_script", tmp_path, monkeypatch)
    found = names["found"]
    assert found["dense"].robust["pgd-20"] > 0.6
    assert found["MRS"].macs < found["dense"].macs
    assert found["allocated"].macs == pytest.approx(found["magnitude"].macs, rel=0.02)
    assert found["allocated"].difference(found["magnitude"], "pgd-20").low > 0  # as the page leads one to expect
    assert names["vit"](names["example_inputs"]).shape == (1, 10)
    assert sum(parameter.numel() for parameter in names["vit"].parameters()) < names["params"]


@pytest.mark.slow
def test_checkpoint_to_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    names = run("checkpoint_to_onnx", tmp_path, monkeypatch)
    report, right, images = names["report"], names["right"], names["attacked_images"]
    assert images == report.after.images
    assert report.rounds[0].reached == pytest.approx(0.5, rel=0.01)
    assert names["apart"] < 1e-3
    assert abs(right["ONNX"] - right["PyTorch"]) <= 2
    assert right["PyTorch"] / images == pytest.approx(report.after.robust["pgd-20"], abs=0.03)
    assert right["PyTorch"] / images > 0.5


@pytest.mark.slow
def test_your_own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("your_own_parts", tmp_path, monkeypatch)
    robust = names["pruned"].after.robust
    assert len(robust) == 2
    assert min(robust.values()) > 0.4
    (comparison,) = names["report"].comparisons(names["folder"])
    assert set(comparison.names) == set(names["contenders"])
    assert all(comparison.size(name, "macs") == pytest.approx(50, abs=2) for name in comparison.names)
