"""Pictures of results, with matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .evaluation import Evaluation
    from .sensitivity import Score, Sensitivity
    from .training import Epoch

BLUE, GREEN, ORANGE = "#0072B2", "#009E73", "#D55E00"  # Okabe and Ito's palette, told apart by the colour-blind
PALE = "#BBBBBB"
SERIES = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"


def plot_sensitivity(sensitivity: Sensitivity, ratios: Mapping[str, float] | None = None) -> Figure:
    """Bars of each group's worst-case and typical sensitivity, in the order of the network, and its pruning ratio.

    Lines show 95% intervals, if there are enough images to tell.
    """
    unknown = [key for key in ratios or {} if key not in sensitivity.groups]
    if unknown:
        raise InputError(
            f"ratios: expected names of groups, got {str(unknown[0])[:60]!r}; for what allocate returns, pass "
            "{name: ratios[module] for name, module in model.named_modules() if module in ratios}"
        )
    order = {name: index for index, name in enumerate(sensitivity.modules)}
    names = sorted(sensitivity.groups, key=lambda name: order.get(name, len(order)))
    panels = [
        ("worst change: MRS (nats)", BLUE, sensitivity.groups, _whiskers(sensitivity, "groups", names)),
        ("typical change: T (nats)", GREEN, sensitivity.typical, _whiskers(sensitivity, "typical", names)),
    ]
    if ratios is not None:
        panels.append(("channels removed (%)", ORANGE, {name: 100 * ratios.get(name, 0.0) for name in names}, None))
    figure = _figure(2.2 + 2.1 * len(panels), 1.7 + 0.26 * len(names))
    axes = figure.subplots(1, len(panels), sharey=True)
    rows = range(len(names))
    for axis, (label, colour, values, whiskers) in zip(axes, panels, strict=True):
        style = {"elinewidth": 1, "ecolor": "#333333"}
        axis.barh(rows, [values[name] for name in names], color=colour, xerr=whiskers, error_kw=style)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=3)
        axis.xaxis.set_major_formatter("{x:g}")
        _tidy(axis, "x")
    _name_rows(axes[0], names)
    if ratios is not None:
        axes[-1].set_xlim(0, 100)
    settings = sensitivity.settings
    figure.suptitle(
        f"Rise of the loss on attacked images when weights change by {settings.get('epsilon', '?')} of their norm\n"
        f"{sensitivity.images} images, estimator {settings.get('estimator', '?')}"
        + (", with 95% intervals" if sensitivity.has_intervals else ""),
        fontsize="medium",
        x=0.02,
        ha="left",
    )
    return figure


def _whiskers(sensitivity: Sensitivity, of: Score, names: list[str]) -> tuple[list[float], list[float]] | None:
    """How far the interval of each score reaches below and above it."""
    if not sensitivity.has_intervals:
        return None
    scores, ends = getattr(sensitivity, of), sensitivity.intervals(of)
    below = [max(scores[name] - ends[name][0], 0.0) for name in names]
    return below, [max(ends[name][1] - scores[name], 0.0) for name in names]


def plot_widths(widths: Mapping[str, tuple[int, int]]) -> Figure:
    """Bars of the channels of each group's root layer, before and after pruning.

    Args:
        widths: name of each group → its channels before and after, as in `Report.widths`, in the order of the network.
    """
    figure = _figure(7.5, 1.6 + 0.26 * len(widths))
    axis, rows = figure.subplots(), range(len(widths))
    before, after = zip(*widths.values(), strict=True)
    axis.barh(rows, before, color=PALE, label="before")
    axis.barh(rows, after, color=BLUE, label="after")
    for row, (wide, narrow) in zip(rows, widths.values(), strict=True):
        axis.annotate(f"{wide} → {narrow}", (wide, row), (4, 0), textcoords="offset points", va="center", size="small")
    axis.set_xlim(0, 1.15 * max(before))
    axis.set_xlabel("output channels")
    _tidy(axis, "x")
    _name_rows(axis, list(widths))
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    figure.suptitle("Channels before and after pruning", fontsize="medium", x=0.02, ha="left")
    return figure


def plot_robustness(curves: Mapping[str, Sequence[Evaluation]], name: str = "worst") -> Figure:
    """Lines of accuracy against the size of the perturbation, with 95% intervals; clean accuracy is at 0.

    Args:
        curves: name of each model → its evaluations at several `eps`, under the same attacks.
        name: of the accuracy, as for `Evaluation.accuracy`.

    Raises:
        InputError: a model has no evaluation.
    """
    lines = {}
    for model, evaluations in _checked(curves).items():
        ordered = sorted(evaluations, key=lambda each: each.eps)
        lines[model] = [(0.0, ordered[0], "clean"), *((each.eps, each, name) for each in ordered if each.eps > 0)]
    figure = _accuracies(lines, name)
    figure.axes[0].set_xlabel("perturbation size ε, for images in [0, 1] (0: clean)")
    return figure


def plot_tradeoff(curves: Mapping[str, Sequence[Evaluation]], name: str = "worst") -> Figure:
    """Lines of accuracy against multiply-accumulates, with 95% intervals.

    Args:
        curves: name of each way of pruning → evaluations of what it made for several budgets, under the same attacks.
        name: of the accuracy, as for `Evaluation.accuracy`.

    Raises:
        InputError: one has no evaluation.
    """
    ordered = {way: sorted(evaluations, key=lambda each: each.macs) for way, evaluations in _checked(curves).items()}
    figure = _accuracies(
        {way: [(each.macs / 1e6, each, name) for each in found] for way, found in ordered.items()}, name
    )
    axis = figure.axes[0]
    axis.set_xlabel("multiply-accumulates for one image (millions)")
    axis.set_xlim(left=0)
    return figure


def _checked(curves: Mapping[str, Sequence[Evaluation]]) -> Mapping[str, Sequence[Evaluation]]:
    empty = [model for model, evaluations in curves.items() if not evaluations]
    if empty or not curves:
        raise InputError(f"curves: expected evaluations of each model, found none of {', '.join(empty) or 'any'}")
    return curves


def _accuracies(lines: Mapping[str, Sequence[tuple[float, Evaluation, str]]], name: str) -> Figure:
    """Lines of points, each of which has its place, an evaluation, and the name of the accuracy there."""
    figure = _figure(6.5, 4.2)
    axis = figure.subplots()
    for index, (label, points) in enumerate(lines.items()):
        heights = [100 * each.accuracy(of) for _, each, of in points]
        ends = [each.interval(of) for _, each, of in points]
        below = [max(height - 100 * low, 0.0) for height, (low, _) in zip(heights, ends, strict=True)]
        above = [max(100 * high - height, 0.0) for height, (_, high) in zip(heights, ends, strict=True)]
        axis.errorbar([x for x, _, _ in points], heights, (below, above), label=label, capsize=3, **_look(index))
    first = next(iter(lines.values()))[0][1]
    axis.set_ylabel("accuracy (%)")
    axis.set_ylim(-2, 102)
    _tidy(axis, "both")
    axis.legend(frameon=False)
    attacks = (list(first.robust) or ["no attack"]) if name == "worst" else [name]
    what = f"in the worst case of {', '.join(attacks)}" if len(attacks) > 1 else f"under {attacks[0]}"
    title = f"Accuracy {what}\n{first.images} images, with 95% intervals"
    axis.set_title(title, fontsize="medium", loc="left", parse_math=False)
    return figure


def plot_training(runs: Mapping[str, Sequence[Epoch]]) -> Figure:
    """Lines of the loss of each epoch, and of clean and robust accuracy on held-out images if they were measured.

    Args:
        runs: name of each → its epochs, such as `Finetuning.history` or what `epochlog.read_epochs` returns.
    """
    measured = any(epoch.robust is not None for epochs in runs.values() for epoch in epochs)
    figure = _figure(4.2 * (1 + measured), 3.6)
    axes = figure.subplots(1, 1 + measured, squeeze=False)[0]
    for index, (name, epochs) in enumerate(runs.items()):
        axes[0].plot([each.epoch for each in epochs], [each.loss for each in epochs], label=name, **_look(index))
        known = [each for each in epochs if each.robust is not None]
        if known:
            numbers, look = [each.epoch for each in known], _look(index)
            axes[1].plot(numbers, [100 * (each.clean or 0) for each in known], label=f"{name}, clean", ls="--", **look)
            axes[1].plot(numbers, [100 * (each.robust or 0) for each in known], label=f"{name}, attacked", **look)
    for axis, label in zip(axes, ("training loss (nats)", "accuracy on held-out images (%)"), strict=False):
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.margins(y=0.1)
        _tidy(axis, "both")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, ncols=2, fontsize="small")
    return figure


def to_image(figure: Figure, kind: Literal["png", "svg"], *, transparent: bool = False) -> bytes:
    """The figure as a file, the same every time."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type") if kind == "svg" else ("Software",))
    with rc_context({"svg.hashsalt": "tp_mrs"}):
        figure.savefig(buffer, format=kind, dpi=150, transparent=transparent, metadata=nothing)
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element to stand in an HTML page among others: nothing but shapes, the same every time."""
    content = to_image(figure, "svg", transparent=True).decode()
    return re.sub(r' (id="[\w.]+_\d+"|xmlns(:xlink)?="[^"]*")', "", content[content.index("<svg") :])


def _figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plot: needs matplotlib; install tp_mrs[plot]") from error
    return Figure(figsize=(width, height), layout="constrained")


def _tidy(axis: Any, grid: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, alpha=0.3)
    axis.set_axisbelow(True)


def _name_rows(axis: Any, names: Sequence[str]) -> None:
    """Names of groups at the rows of a bar chart, first on top, as they are: a dollar sign begins no formula."""
    axis.set_yticks(range(len(names)), names, parse_math=False)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_ylabel("coupled group, by its root layer")


def _look(index: int) -> dict[str, Any]:
    """Colour and marker of a line; they tell it apart in grey, too."""
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}
