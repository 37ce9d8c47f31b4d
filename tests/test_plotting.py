"""Pictures: what they show, in numbers; how they look is for people to judge."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from tp_mrs import Evaluation, InputError
from tp_mrs.epochlog import read_epochs
from tp_mrs.plotting import plot_robustness, plot_tradeoff, plot_training, plot_widths, to_image, to_svg
from tp_mrs.training import Epoch


def evaluation(eps: float, clean: int, robust: int, attack: str = "fgsm") -> Evaluation:
    """Of 80 images, of which so many are classified correctly."""
    right = {"clean": np.arange(80) < clean, attack: np.arange(80) < robust}
    return Evaluation(
        clean=clean / 80,
        robust={attack: robust / 80},
        worst=min(clean, robust) / 80,
        images=80,
        macs=2_000_000,
        params=1000,
        size_bytes=4000,
        latency_ms=None,
        eps=eps,
        outcomes={name: np.packbits(outcome).tobytes().hex() for name, outcome in right.items()},
        checksum="0",
        warnings=(),
    )


def test_widths_in_the_order_of_the_network() -> None:
    (axis,) = plot_widths({"stem$1$": (16, 5), "late": (64, 60)}).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["stem$1$", "late"]
    assert [bar.get_width() for bars in axis.containers for bar in bars] == [16, 64, 5, 60]
    assert [text.get_text() for text in axis.texts] == ["16 → 5", "64 → 60"]


def test_accuracy_against_eps_begins_with_the_clean_one() -> None:
    (axis,) = plot_robustness({"dense": [evaluation(0.2, 72, 20), evaluation(0.1, 72, 40)]}).axes
    line = axis.lines[0]
    assert np.asarray(line.get_xdata()).tolist() == [0, 0.1, 0.2]
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx([90, 50, 25])
    plot_robustness({"hopeless": [evaluation(0.1, 80, 0)], "perfect": [evaluation(0.1, 80, 80)]})
    with pytest.raises(InputError, match="curves: expected evaluations of each model, found none of pruned"):
        plot_robustness({"dense": [evaluation(0.1, 72, 40)], "pruned": []})


def test_accuracy_against_macs() -> None:
    small = replace(evaluation(0.1, 72, 20), macs=1_000_000)
    (axis,) = plot_tradeoff({"uniform": [evaluation(0.1, 72, 40), small]}, "fgsm").axes
    line = axis.lines[0]
    assert np.asarray(line.get_xdata()).tolist() == [1, 2]
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx([25, 50])
    assert "under fgsm" in axis.get_title(loc="left")
    with pytest.raises(InputError, match="curves: expected evaluations of each model, found none of any"):
        plot_tradeoff({})


def test_training_curves_of_the_last_run_in_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    runs = [[Epoch(1, 8, 2.0, 0.1), Epoch(2, 8, 1.5, 0.1)], [Epoch(1, 8, 1.0, 0.1, 0.9, 0.5)]]
    log.write_text("".join(json.dumps(asdict(epoch)) + "\n" for run in runs for epoch in run))
    assert list(read_epochs(log)) == runs[1]
    assert len(plot_training({"first": runs[0]}).axes) == 1
    loss, accuracy = plot_training({"first": runs[0], "last": runs[1]}).axes
    assert [np.asarray(line.get_ydata()).tolist() for line in loss.lines] == [[2.0, 1.5], [1.0]]
    assert [np.asarray(line.get_ydata()).tolist() for line in accuracy.lines] == [[90], [50]]
    log.write_text('{"epoch": 1}\n')
    with pytest.raises(InputError, match=r"path: .*log.jsonl is no log of epochs"):
        read_epochs(log)
    with pytest.raises(InputError, match="path: cannot read"):
        read_epochs(tmp_path / "none.jsonl")


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_picture_is_the_same_file(kind: Literal["png", "svg"]) -> None:
    first, second = (to_image(plot_widths({"stem": (8, 4)}), kind) for _ in range(2))
    assert first == second
    assert b"<dc:date>" not in first


def test_svg_stands_in_a_page() -> None:
    first, second = (to_svg(plot_widths({"</svg><script>": (8, 4)})) for _ in range(2))
    assert first == second
    assert first.startswith("<svg")
    assert "http" not in first
    assert "<script" not in first
    assert first.count("</svg>") == 1
