"""The report as a page: complete, by itself, and safe whatever the names."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
import torchattacks
from torch import nn

from tests.conftest import Batches, small_cnn
from tests.test_plotting import evaluation
from tp_mrs import Report, mrpf
from tp_mrs.cli.display import pictures
from tp_mrs.html import report_page
from tp_mrs.plotting import to_svg

EVIL = "<script>alert('&\"')</script>"


class Reader(HTMLParser):
    """The tags, attributes and text of a page; each tag that is opened must be closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(EVIL.replace(".", ""), small_cnn())
    data: Batches = [(torch.rand(8, 3, 32, 32), torch.arange(8) % 4)]
    made = mrpf(model, torch.rand(1, 3, 32, 32), data, torchattacks.FGSM, macs=0.48, test_data=data, attacks=["fgsm"])
    return replace(made, curves={EVIL: [evaluation(0.1, 70, 40), evaluation(0.2, 70, 20)]})


def test_the_page_is_complete_and_escapes_names(report: Report) -> None:
    figures = {name: to_svg(figure) for name, figure in pictures(report).items()}
    assert list(figures) == ["sensitivity", "widths", "robustness", "training"]
    run = {"command": "prune", "model": EVIL, "attacks": ["fgsm", EVIL], "model_kwargs": {"a": EVIL}, "quiet": False}
    page = report_page(report, model=EVIL, data=EVIL, run=run, classes=[EVIL, "cat"], pictures=figures)
    found = Reader(page)
    assert "script" not in found.tags
    assert "http" not in page
    assert not {name for name in found.attributes if name.startswith("on") or name in ("src", "href")}
    for text in (
        EVIL,
        f"{EVIL}, cat",
        f"a={EVIL}",
        "fine-tuned",
        "fgsm (%)",
        "change, dense to fine-tuned",
        "points (",
    ):
        assert text in found.text
    assert "What these gave, layers get from the others" in found.text
    assert "and the variances that it learned" in found.text
    assert page.count("<figure>") == page.count("<svg") == 4
    assert "torch-pruning" in found.text


def test_without_compensation(report: Report) -> None:
    plain = replace(report, settings={**report.settings, "compensate": False})
    page = report_page(plain, model="m", data="d", run={})
    assert "What these gave" not in page
    assert "BatchNorm has new means and variances" in page


def test_warnings_and_no_evaluation(report: Report) -> None:
    assert report.before is not None
    warned = replace(report, before=replace(report.before, warnings=("Masked & more.",)))
    assert "dense: Masked &amp; more." in report_page(warned, model="m", data="d", run={})
    bare = replace(report, before=None, after=None, rounds=(replace(report.rounds[0], pruned=None, finetuning=None),))
    page = report_page(bare, model="m", data="d", run={})
    assert "<h2>Results</h2>" not in page
    assert "Fine-tuned" not in page
