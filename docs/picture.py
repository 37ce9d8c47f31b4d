"""The picture of two coupled groups and their channels: `python -m docs.picture` draws it anew.

The network and its sensitivities are those of a benchmark's result; how many channels go is what `allocate` says.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tp_mrs
from benchmarks.networks import NETWORKS
from tp_mrs import Sensitivity
from tp_mrs.counting import count
from tp_mrs.pruning import prune_by_ratio

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/sensitivity-digits-resnet18.json"
PICTURE = ROOT / "docs/images/groups.svg"

GROUPS = {"A": "layer1.0.downsample.0", "B": "layer1.1.conv1"}
COLOURS = {"A": "#0072B2", "B": "#D55E00", "": "#BBBBBB"}  # Okabe and Ito's palette, told apart by the colour-blind
WIDTH, HEIGHT = 860, 606


@dataclass(frozen=True)
class Channels:
    """T² / c of each channel of a group, ascending, and how many of them go; c is a fraction of the MACs."""

    values: tuple[float, ...]
    removed: int


def drawing() -> str:
    """The whole picture as SVG."""
    sensitivity = Sensitivity.load(RESULT)
    body = "\n".join([*_network(sensitivity), *_plot(ordered(sensitivity), sensitivity.images)])
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" \
font-size="13" role="img">
<title>Two coupled groups of a residual block, and which of their channels are removed</title>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">\
<path d="M0 0L8 4L0 8z" fill="#555555"/></marker></defs>
<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#FFFFFF"/>
{body}
</svg>
"""


def ordered(sensitivity: Sensitivity) -> dict[str, Channels]:
    """The channels of both groups, and how many go if 40% of the MACs are to stay, at α = 1."""
    arguments = NETWORKS["digits", "resnet18"]["arguments"]
    model = tp_mrs.create_model("resnet18", num_classes=10, in_chans=1, image_size=32, **arguments).eval()
    images = torch.zeros(1, 1, 32, 32)
    ratios = tp_mrs.allocate(model, images, sensitivity, macs=0.4, alpha=1)
    found = {}
    for letter, group in GROUPS.items():
        units, cost = sorted(sensitivity.units[group]), _cost(model, images, group)
        removed = int(ratios[model.get_submodule(group)] * len(units) + 0.5)
        found[letter] = Channels(tuple(unit**2 / cost for unit in units), removed)
    return found


def _cost(model: torch.nn.Module, images: torch.Tensor, group: str) -> float:
    """What removing one channel of the group saves, as a fraction of the MACs."""
    pruned = copy.deepcopy(model)
    root: Any = pruned.get_submodule(group)
    prune_by_ratio(pruned, images, {root: 0.99 / root.out_channels})
    return 1 - count(pruned, images).macs / count(model, images).macs


# --- the network -------------------------------------------------------------------------------------------------

BOX_WIDTH, BOX_HEIGHT = 136, 30
LAYERS = {  # name of each layer → its left upper corner, and the groups of its inputs and outputs
    "layer1.0.downsample.0": (18, 86, "", "A"),
    "layer1.0.conv2": (18, 172, "", "A"),
    "layer1.1.conv1": (258, 172, "A", "B"),
    "layer1.1.conv2": (452, 172, "B", "A"),
    "layer2.0.downsample.0": (688, 86, "A", ""),
    "layer2.0.conv1": (688, 172, "A", ""),
}
ADDITIONS = ((206, 101), (652, 101))
WIRES = ("M154 101H192", "M154 187H206V115", "M220 101H638", "M236 101V187H254", "M394 187H448", "M588 187H652V115")
WIRES_OUT = ("M666 101H684", "M672 101V187H684")


def _network(sensitivity: Sensitivity) -> Iterator[str]:
    yield _text(18, 28, "Coupled: what belongs to one channel, in all layers that it passes through", weight="bold")
    legend = (
        "Layers take the channels on their left and make those on their right. MRS: sensitivity of a layer, in nats."
    )
    yield _text(18, 48, legend, colour="#555555")
    for wire in (*WIRES, *WIRES_OUT):
        yield f'<path d="{wire}" fill="none" stroke="#555555" stroke-width="1.5" marker-end="url(#tip)"/>'
    yield _text(429, 92, "shortcut", colour="#555555", anchor="middle")
    for x, y in ADDITIONS:
        yield f'<circle cx="{x}" cy="{y}" r="13" fill="#FFFFFF" stroke="#555555" stroke-width="1.5"/>'
        yield _text(x, y + 5, "+", anchor="middle", weight="bold")
    for name, (x, y, taken, made) in LAYERS.items():
        yield _text(x, y - 7, name)
        yield from _box(x, y, taken, made)
        yield _text(x, y + BOX_HEIGHT + 16, f"MRS {sensitivity.modules[name]:.3f}", colour="#555555", size=12)


def _box(x: int, y: int, taken: str, made: str) -> Iterator[str]:
    half = BOX_WIDTH // 2
    for left, group in ((x, taken), (x + half, made)):
        colour = COLOURS[group]
        yield f'<rect x="{left}" y="{y}" width="{half}" height="{BOX_HEIGHT}" fill="{colour}"/>'
        yield _text(left + half // 2, y + 20, group, colour="#FFFFFF", anchor="middle", weight="bold")


# --- the channels ------------------------------------------------------------------------------------------------

TOP, BOTTOM = 356, 546
PANELS = {"A": 92, "B": 486}  # their left edges
PANEL = 350
WHAT = {"A": "all that meets on the shortcut", "B": "inside the block"}


def _plot(groups: Mapping[str, Channels], images: int) -> Iterator[str]:
    """A panel for each group; heights are logarithms of T² / c over λ."""
    level = _level(groups)
    heights = {name: [math.log10(each / level) for each in group.values] for name, group in groups.items()}
    every = [height for own in heights.values() for height in own]
    low, high = min(every) - 0.2, max(every) + 0.2

    def y_of(height: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (height - low) / (high - low)

    yield f'<path d="M18 250H{WIDTH - 18}" stroke="#DDDDDD"/>'
    yield _text(18, 282, "How many go: the channels that cost little for what they save", weight="bold")
    rule = "T² is how much losses change as a channel fades, c what removing it saves; λ is the same for all groups."
    yield _text(18, 302, rule, colour="#555555")
    yield _text(18, 340, "T² / c", colour="#555555")
    for tick in range(math.ceil(low), math.floor(high) + 1):
        yield _text(78, round(y_of(tick)) + 4, _multiple(tick), colour="#555555", anchor="end", size=12)
    for name, x in PANELS.items():
        group, line = groups[name], y_of(0)
        yield f'<rect x="{x - 6}" y="{TOP}" width="{PANEL + 12}" height="{BOTTOM - TOP}" fill="#F6F6F6"/>'
        yield f'<rect x="{x - 6}" y="{line:.1f}" width="{PANEL + 12}" height="{BOTTOM - line:.1f}" fill="#E4E4E4"/>'
        yield f'<path d="M{x - 6} {line:.1f}H{x + PANEL + 6}" stroke="#222222" stroke-width="1.5"/>'
        yield f'<rect x="{x - 6}" y="324" width="24" height="24" fill="{COLOURS[name]}"/>'
        yield _text(x + 6, 341, name, colour="#FFFFFF", anchor="middle", weight="bold")
        yield _text(x + 26, 341, f"{WHAT[name]}: {group.removed} of {len(group.values)} channels go")
        for number, height in enumerate(heights[name]):
            fill = "#FFFFFF" if number < group.removed else COLOURS[name]
            yield (
                f'<circle cx="{x + PANEL * (number + 0.5) / len(heights[name]):.1f}" cy="{y_of(height):.1f}" r="4" '
                f'fill="{fill}" stroke="{COLOURS[name]}" stroke-width="1.5"/>'
            )
        yield _text(x + PANEL / 2, round(line) - 7, "stay", anchor="middle", size=12)
        yield _text(x + PANEL, BOTTOM - 8, "go", anchor="end", size=12)
        yield _text(
            x + PANEL / 2, BOTTOM + 18, "channels, in ascending order", colour="#555555", anchor="middle", size=12
        )
    note = f"A small ResNet-18 on digits, {images} images; 40% of the MACs stay, α = 1. Its other groups are not shown."
    yield _text(18, HEIGHT - 16, note, colour="#555555", size=12)


def _level(groups: Mapping[str, Channels]) -> float:
    """λ: between what goes and what stays, but for the channels that rounding moves across."""
    every = sorted(value for group in groups.values() for value in group.values)

    def misplaced(level: float) -> int:
        return sum(abs(sum(value <= level for value in group.values) - group.removed) for group in groups.values())

    return min((math.sqrt(one * next_one) for one, next_one in itertools.pairwise(every)), key=misplaced)


def _multiple(power: int) -> str:
    """The power of ten times λ: "λ / 100", "λ", "10 λ"."""
    if power == 0:
        return "λ"
    return f"{10**power:,} λ" if power > 0 else f"λ / {10**-power:,}"


def _text(
    x: float, y: float, text: str, *, colour: str = "#222222", anchor: str = "start", weight: str = "", size: int = 13
) -> str:
    style = f' font-weight="{weight}"' if weight else ""
    return f'<text x="{x:g}" y="{y}" fill="{colour}" text-anchor="{anchor}" font-size="{size}"{style}>{text}</text>'


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
