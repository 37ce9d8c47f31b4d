"""Pictures of results, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .sensitivity import Score, Sensitivity

BLUE, GREEN, ORANGE = "#0072B2", "#009E73", "#D55E00"  # Okabe and Ito's palette, told apart by the colour-blind


def plot_sensitivity(sensitivity: Sensitivity, ratios: Mapping[str, float] | None = None) -> Figure:
    """Bars of each group's worst-case and typical sensitivity, in the order of the network, and its pruning ratio.

    Lines show 95% intervals, if there are enough images to tell.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plot: needs matplotlib; install tp_mrs[plot]") from error
    unknown = [key for key in ratios or {} if key not in sensitivity.groups]
    if unknown:
        raise InputError(
            f"ratios: expected names of groups, got {str(unknown[0])[:60]!r}; for what allocate returns, pass "
            "{name: ratios[module] for name, module in model.named_modules() if module in ratios}"
        )
    order = {name: index for index, name in enumerate(sensitivity.modules)}
    names = sorted(sensitivity.groups, key=lambda name: order.get(name, len(order)))
    panels = [
        ("worst case: MRS (nats)", BLUE, sensitivity.groups, _whiskers(sensitivity, "groups", names)),
        ("typical: T (nats)", GREEN, sensitivity.typical, _whiskers(sensitivity, "typical", names)),
    ]
    if ratios is not None:
        panels.append(("channels removed (%)", ORANGE, {name: 100 * ratios.get(name, 0.0) for name in names}, None))
    figure = Figure(figsize=(2.5 + 3 * len(panels), 1.6 + 0.26 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    rows = range(len(names))
    for axis, (label, colour, values, whiskers) in zip(axes, panels, strict=True):
        style = {"elinewidth": 1, "ecolor": "#333333"}
        axis.barh(rows, [values[name] for name in names], color=colour, xerr=whiskers, error_kw=style)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=4)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_yticks(rows, names)
    axes[0].invert_yaxis()
    axes[0].set_ylabel("coupled group, by its root layer")
    if ratios is not None:
        axes[-1].set_xlim(0, 100)
    figure.suptitle(
        f"Module Robustness Sensitivity: robust cross-entropy lost, {sensitivity.images} images, "
        f"ε = {sensitivity.settings.get('epsilon', '?')} ({sensitivity.settings.get('estimator', '?')})",
        fontsize="medium",
    )
    return figure


def _whiskers(sensitivity: Sensitivity, of: Score, names: list[str]) -> tuple[list[float], list[float]] | None:
    """How far the interval of each score reaches below and above it."""
    if not sensitivity.has_intervals:
        return None
    scores, ends = getattr(sensitivity, of), sensitivity.intervals(of)
    below = [max(scores[name] - ends[name][0], 0.0) for name in names]
    return below, [max(ends[name][1] - scores[name], 0.0) for name in names]
