"""What people see of a run: messages while it goes on, and at the end tables and figures."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tp_mrs.evaluation import Evaluation, accuracy_text, comparison
from tp_mrs.files import write_bytes
from tp_mrs.pipeline import Report
from tp_mrs.plotting import plot_robustness, plot_training, plot_widths, to_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    title = f"{what}, {report.settings['budget']} {report.rounds[-1].reached:.1%} of the dense model's"
    print_evaluations(report.stages, title)


def _dimmed(accuracy: tuple[str, str]) -> str:
    return f"{accuracy[0]} [dim]{accuracy[1]}[/dim]"


def print_evaluations(rows: Mapping[str, Evaluation], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(iter(rows.values()))
    caption = f"{first.images} test images; in % with 95% intervals"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    accuracies, sizes = comparison(rows)
    for name, cells in accuracies.items():
        table.add_row(name, *map(_dimmed, cells))
    table.add_section()
    for name, values in sizes.items():
        table.add_row(name, *values)
    Console().print(table)
    for name, row in rows.items():
        for sentence in row.warnings:
            print(f"Warning ({name}): {sentence}")


def print_curves(curves: Mapping[str, Sequence[Evaluation]]) -> None:
    """Accuracy at each size of perturbation; a table for each model."""
    from rich.console import Console
    from rich.table import Table

    for model, evaluations in curves.items():
        print(f"\n{model}, accuracy by size of perturbation (in % with 95% intervals)")
        table = Table("eps")
        names = [name for name in evaluations[0].names if name != "clean"]
        for name in names:
            table.add_column(name, justify="right")
        for each in evaluations:
            table.add_row(f"{each.eps:.4g}", *(_dimmed(accuracy_text(each, name)) for name in names))
        Console().print(table)


def print_change(before: Evaluation, after: Evaluation) -> None:
    """What became better or worse, with 95% intervals of the difference on the same images."""
    print("\nChange, with 95% intervals:")
    width = max(map(len, after.names))
    for name in after.names:
        print(f"  {name:<{width}}  {after.difference(before, name)}")


def pictures(report: Report) -> dict[str, Figure]:
    """What there is to see in a report, under the names of the files."""
    histories = {f"round {number}": each.finetuning for number, each in enumerate(report.rounds, start=1)}
    epochs = {name: record.history for name, record in histories.items() if record is not None}
    found = {"sensitivity": report.plot(), "widths": plot_widths(report.widths)}
    if report.curves:
        found["robustness"] = plot_robustness(report.curves)
    if epochs:
        found["training"] = plot_training(epochs)
    return found


def save_figure(figure: Figure, stem: Path) -> None:
    """As PNG and as SVG, the same bytes for the same figure."""
    write_bytes(stem.with_suffix(".png"), to_image(figure, "png"))
    write_bytes(stem.with_suffix(".svg"), to_image(figure, "svg"))
