"""The picture of two coupled groups and their pruning ratios: `python -m docs.picture` draws it anew.

The network and its sensitivities are those of a benchmark's result; the ratios are what `allocate` makes of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tp_mrs
from tp_mrs.files import read_json
from tp_mrs.pruning import count, prune_by_ratio
from tp_mrs.sensitivity import combined

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/sensitivity-damage-digits-resnet18.json"
PICTURE = ROOT / "docs/images/groups.svg"

STREAM, INSIDE = "layer1.0.downsample.0", "layer1.1.conv1"
COLOURS = {"A": "#0072B2", "B": "#D55E00", "": "#BBBBBB"}  # Okabe and Ito's palette, told apart by the colour-blind
WIDTH, HEIGHT = 860, 458


@dataclass(frozen=True)
class Row:
    """What there is to know of a group: T in nats, c as a fraction of the MACs, channels, and how many of them go."""

    typical: float
    cost: float
    channels: int
    removed: int


def drawing() -> str:
    """The whole picture as SVG."""
    result = read_json(RESULT, "tp_mrs.sensitivity_benchmark/1")
    rows = measured(result)
    parts = [*_network(result), *_table({"A": rows[STREAM], "B": rows[INSIDE]})]
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" \
font-size="13" role="img">
<title>Two coupled groups of a residual block, and how their pruning ratios come about</title>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">\
<path d="M0 0L8 4L0 8z" fill="#555555"/></marker></defs>
<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#FFFFFF"/>
{body}
</svg>
"""


def measured(result: Mapping[str, Any]) -> dict[str, Row]:
    """Name of each of the two groups → its row, at half of the MACs."""
    model = tp_mrs.create_model("resnet18", num_classes=10, in_chans=1, image_size=32, **result["arguments"]).eval()
    images = torch.zeros(1, 1, 32, 32)
    scores, sizes = result["modules"]["first_order"], result["sizes"]
    typical = {
        group: float(combined(*(np.array([of[layer] for layer in layers]) for of in (scores, sizes)), typical=True))
        for group, layers in result["members"].items()
    }
    ratios = tp_mrs.allocate(model, images, typical, macs=0.5)
    rows = {}
    for group in (STREAM, INSIDE):
        root: Any = model.get_submodule(group)
        channels = root.out_channels
        rows[group] = Row(typical[group], _cost(model, images, group), channels, int(ratios[root] * channels + 0.5))
    return rows


def _cost(model: torch.nn.Module, images: torch.Tensor, group: str) -> float:
    """The group's part of the MACs: what removing one of its channels saves, times their number."""
    pruned = copy.deepcopy(model)
    root: Any = pruned.get_submodule(group)
    channels = root.out_channels
    prune_by_ratio(pruned, images, {root: 0.99 / channels})
    return float(channels * (1 - count(pruned, images)[0] / count(model, images)[0]))


# --- the network -------------------------------------------------------------------------------------------------

BOX_WIDTH, BOX_HEIGHT = 136, 30
LAYERS = {  # name of each layer → its left upper corner, and the groups of its inputs and outputs
    "layer1.0.downsample.0": (18, 86, "", "A"),
    "layer1.0.conv2": (18, 172, "", "A"),
    "layer1.1.conv1": (258, 172, "A", "B"),
    "layer1.1.conv2": (452, 172, "B", "A"),
    "layer2.0.downsample.0": (696, 86, "A", ""),
    "layer2.0.conv1": (696, 172, "A", ""),
}
ADDITIONS = ((206, 101), (652, 101))
WIRES = ("M154 101H192", "M154 187H206V115", "M220 101H638", "M236 101V187H254", "M394 187H448", "M588 187H652V115")
WIRES_OUT = ("M666 101H692", "M680 101V187H692")


def _network(result: Mapping[str, Any]) -> Iterator[str]:
    yield _text(18, 28, "Coupled: what belongs to one channel, in all layers that it passes through", weight="bold")
    legend = "Layers take the channels on their left and make those on their right; n is the number of weights."
    yield _text(18, 48, legend, colour="#555555")
    for wire in (*WIRES, *WIRES_OUT):
        yield f'<path d="{wire}" fill="none" stroke="#555555" stroke-width="1.5" marker-end="url(#tip)"/>'
    yield _text(429, 92, "shortcut", colour="#555555", anchor="middle")
    for x, y in ADDITIONS:
        yield f'<circle cx="{x}" cy="{y}" r="13" fill="#FFFFFF" stroke="#555555" stroke-width="1.5"/>'
        yield _text(x, y + 5, "+", anchor="middle", weight="bold")
    for name, (x, y, taken, made) in LAYERS.items():
        score, size = result["modules"]["first_order"][name], result["sizes"][name]
        yield _text(x, y - 7, name)
        yield from _box(x, y, taken, made)
        yield _text(x, y + BOX_HEIGHT + 16, f"MRS {score:.3f}, n {size:,}", colour="#555555", size=12)


def _box(x: int, y: int, taken: str, made: str) -> Iterator[str]:
    half = BOX_WIDTH // 2
    for left, group in ((x, taken), (x + half, made)):
        colour = COLOURS[group]
        yield f'<rect x="{left}" y="{y}" width="{half}" height="{BOX_HEIGHT}" fill="{colour}"/>'
        yield _text(left + half // 2, y + 20, group, colour="#FFFFFF", anchor="middle", weight="bold")


# --- the table ---------------------------------------------------------------------------------------------------

HEADS = {18: "group", 292: "T (10⁻³ nats)", 428: "c (% of the MACs)", 574: "c / T", 706: "channels removed"}
BAR = 80


def _table(rows: Mapping[str, Row]) -> Iterator[str]:
    what = {"A": "all that meets on the shortcut", "B": "inside the block"}
    yield f'<path d="M18 250H{WIDTH - 18}" stroke="#DDDDDD"/>'
    yield _text(18, 282, "The ratio: what a group costs, over how sensitive it is", weight="bold")
    rule = "T = √(Σ MRS² / n) over the layers of the group; half of the MACs are to go."
    yield _text(18, 302, rule, colour="#555555")
    for x, head in HEADS.items():
        yield _text(x, 336, head, colour="#555555", size=12)
    tops = [max(values) for values in zip(*(_quantities(row) for row in rows.values()), strict=True)]
    for number, (name, row) in enumerate(rows.items()):
        y = 348 + 40 * number
        yield f'<rect x="18" y="{y}" width="28" height="28" fill="{COLOURS[name]}"/>'
        yield _text(32, y + 19, name, colour="#FFFFFF", anchor="middle", weight="bold")
        yield _text(56, y + 19, what[name])
        *xs, last = list(HEADS)[1:]
        for x, value, top, decimals in zip(xs, _quantities(row), tops, (2, 1, 1), strict=True):
            yield from _bar(x, y, value / top, f"{value:.{decimals}f}", COLOURS[name])
        yield f'<rect x="{last}" y="{y + 4}" width="{BAR}" height="20" fill="#DDDDDD"/>'
        yield from _bar(last, y, row.removed / row.channels, "", COLOURS[name])
        yield _text(last + BAR + 6, y + 19, f"{row.removed} of {row.channels}")
    note = "A small ResNet-18 on digits, 256 images. Its other layers and groups are not shown; they take their part."
    yield _text(18, HEIGHT - 16, note, colour="#555555", size=12)


def _quantities(row: Row) -> tuple[float, float, float]:
    """T, c and c / T, in the units of the table."""
    return 1e3 * row.typical, 100 * row.cost, 0.1 * row.cost / row.typical


def _bar(x: int, y: int, share: float, label: str, colour: str) -> Iterator[str]:
    length = BAR * share
    yield f'<rect x="{x}" y="{y + 4}" width="{length:.1f}" height="20" fill="{colour}"/>'
    yield _text(round(x + length + 6), y + 19, label)


def _text(
    x: float, y: float, text: str, *, colour: str = "#222222", anchor: str = "start", weight: str = "", size: int = 13
) -> str:
    style = f' font-weight="{weight}"' if weight else ""
    return f'<text x="{x:g}" y="{y}" fill="{colour}" text-anchor="{anchor}" font-size="{size}"{style}>{text}</text>'


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
