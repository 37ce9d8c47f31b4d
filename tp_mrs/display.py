"""What people see of a run: messages while it goes on, and at the end tables and figures."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .evaluation import Evaluation
from .files import write_bytes
from .pipeline import Report


@contextmanager
def messages(*, quiet: bool) -> Iterator[None]:
    """Our messages on the screen, Torch-Pruning's warnings not; all as before afterwards.

    An evaluation's warnings are part of what is printed at the end, so that they are not logged, too.
    """
    wanted = {"tp_mrs": logging.ERROR if quiet else logging.INFO, "tp_mrs.evaluation": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in wanted}
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name, level in wanted.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch_pruning")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def print_report(report: Report, what: str) -> None:
    last = report.rounds[-1]
    rows = {"dense": report.before, "pruned": last.pruned, "fine-tuned": report.after}
    title = f"{what}, {report.settings['budget']} {last.reached:.1%} of the dense model's"
    print_evaluations({name: row for name, row in rows.items() if row is not None}, title)


def print_evaluations(rows: dict[str, Evaluation], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(iter(rows.values()))
    caption = f"{first.images} test images; in % with 95% intervals"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    for score in first.names:
        cells = (f"{100 * row.accuracy(score):.1f} [dim]{row.interval_text(score)}[/dim]" for row in rows.values())
        table.add_row(score, *cells)
    table.add_section()
    table.add_row("MACs (M)", *(f"{row.macs / 1e6:.1f}" for row in rows.values()))
    table.add_row("params (M)", *(f"{row.params / 1e6:.3f}" for row in rows.values()))
    table.add_row("MB", *(f"{row.size_bytes / 1e6:.2f}" for row in rows.values()))
    if first.latency_ms is not None:
        table.add_row("ms, one image", *(f"{row.latency_ms or 0:.2f}" for row in rows.values()))
    Console().print(table)
    for name, row in rows.items():
        for sentence in row.warnings:
            print(f"Warning ({name}): {sentence}")


def print_change(before: Evaluation, after: Evaluation) -> None:
    """What became better or worse, with 95% intervals of the difference on the same images."""
    print("\nChange, with 95% intervals:")
    width = max(map(len, after.names))
    for name in after.names:
        print(f"  {name:<{width}}  {after.difference(before, name)}")


def save_figure(figure: Any, stem: Path) -> None:
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150)
        write_bytes(stem.with_suffix(f".{kind}"), buffer.getvalue())
