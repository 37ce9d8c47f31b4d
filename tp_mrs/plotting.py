"""Pictures of results, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .sensitivity import Sensitivity

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's palette, told apart by the colour-blind


def plot_sensitivity(sensitivity: Sensitivity, ratios: Mapping[str, float] | None = None) -> Figure:
    """Bars of each group's sensitivity, in the order of the network, and beside them the ratio each was pruned by."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plot: needs matplotlib; install tp_mrs[plot]") from error
    order = {name: index for index, name in enumerate(sensitivity.modules)}
    names = sorted(sensitivity.groups, key=lambda name: order.get(name, len(order)))
    rows = range(len(names))
    figure = Figure(figsize=(9 if ratios else 6, 1.6 + 0.26 * len(names)), layout="constrained")
    axes = figure.subplots(1, 2 if ratios else 1, sharey=True, squeeze=False)[0]
    left = axes[0]
    left.barh(rows, [sensitivity.groups[name] for name in names], color=BLUE)
    left.set_yticks(rows, names)
    left.invert_yaxis()
    left.set_xlabel("sensitivity MRS (nats of robust cross-entropy)")
    left.set_ylabel("coupled group, by its root layer")
    if ratios:
        right = axes[1]
        right.barh(rows, [100 * ratios.get(name, 0.0) for name in names], color=ORANGE)
        right.set_xlim(0, 100)
        right.set_xlabel("channels removed (%)")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    figure.suptitle(
        f"Module Robustness Sensitivity, {sensitivity.images} images, "
        f"ε = {sensitivity.settings.get('epsilon', '?')} ({sensitivity.settings.get('estimator', '?')})",
        fontsize="medium",
    )
    return figure
