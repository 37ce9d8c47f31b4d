"""How much faster models with half of the MACs are on this machine, and how long loading them takes.

    python -m benchmarks.latency

Dense and pruned run in turn in one process. All groups lose alike, in multiples of 8 channels.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch_pruning as tp
import torchattacks
from torch import Tensor, nn

import tp_mrs
from benchmarks.tables import RESULTS, fill, provenance
from benchmarks.timing import timed
from tp_mrs.files import read_json, write_json
from tp_mrs.pruning import count

RESULT = RESULTS / "latency.json"
FORMAT = "tp_mrs.latency/1"
MODELS = ("resnet18", "vgg16_bn", "mobilevit_xxs")
SIDE, PAIRS, LOADS, ROUND_TO = 224, 5, 7, 8
BATCHES = ((1, 1), (1, 2), (64, 2))
"""Batch size and threads."""


def main() -> None:
    models = {name: measure(name) for name in MODELS}
    settings = {"image_size": SIDE, "pairs": PAIRS, "loads": LOADS, "round_to": ROUND_TO, "macs": 0.5}
    RESULT.parent.mkdir(exist_ok=True)
    write_json(RESULT, {"format": FORMAT, "settings": settings, **provenance(), "models": models})
    fill("latency", table())


def measure(name: str) -> dict[str, Any]:
    """Ratios pruned / dense: MACs, parameters, latency by batch size; and loading against timm's creation."""
    torch.manual_seed(0)
    dense, pruned = (tp_mrs.create_model(name, num_classes=10).eval() for _ in range(2))
    images = torch.rand(1, 3, SIDE, SIDE)
    halve(pruned, images)
    before, after = count(dense, images), count(pruned, images)
    row: dict[str, Any] = {"macs": round(after[0] / before[0], 3), "params": round(after[1] / before[1], 3)}
    for batch, threads in BATCHES:
        torch.set_num_threads(threads)
        row[f"batch {batch}, {threads} threads"] = paired(forward(pruned, batch), forward(dense, batch), PAIRS)
    with tempfile.TemporaryDirectory() as folder:
        path = tp_mrs.save(pruned, Path(folder) / "model.safetensors")
        row["load"] = paired(lambda: tp_mrs.load(path), lambda: timm.create_model(name, num_classes=10), LOADS)
    return row


def halve(model: nn.Module, images: Tensor) -> None:
    """Prune to half of the MACs; `alpha=0` makes nothing of the sensitivity."""
    data = [(images, torch.zeros(1, dtype=torch.long))]
    sensitivity = tp_mrs.measure_sensitivity(model, data, torchattacks.VANILA, example_inputs=images, progress=False)
    ratios = tp_mrs.allocate(model, images, sensitivity, macs=0.5, alpha=0.0, round_to=ROUND_TO)
    pruner = tp.pruner.BasePruner(
        model,
        images,
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        **tp_mrs.pruner_kwargs(model),
    )
    pruner.step()
    tp_mrs.refresh(model)


def forward(model: nn.Module, batch: int) -> Callable[[], Any]:
    images, repeats = torch.rand(batch, 3, SIDE, SIDE), max(1, 16 // batch)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(repeats):
            model(images)

    return run


def paired(ours: Callable[[], Any], other: Callable[[], Any], pairs: int) -> dict[str, float]:
    """Median, least and greatest ratio of times over pairs of runs, after one to warm up."""
    ratios = [timed(ours) / timed(other) for _ in range(pairs + 1)][1:]
    numbers = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {key: round(value, 3) for key, value in numbers.items()}


def table() -> str:
    """The results as Markdown."""
    result = read_json(RESULT, FORMAT)
    settings = result["settings"]
    lines = [
        f"Latency of the model pruned to half of the MACs in multiples of {settings['round_to']} channels, divided by "
        f"the dense one's; {settings['image_size']} px, median of {settings['pairs']} pairs and their range. Loading "
        f"the pruned model is divided by `timm.create_model`. On {result['device']}.",
        "",
    ]
    for position, (name, row) in enumerate(result["models"].items()):
        timed = list(row)[2:]
        if position == 0:
            lines.append(f"| model | MACs | params | {' | '.join(timed)} |")
            lines.append("| --- |" + " ---: |" * (2 + len(timed)))
        ranges = (f"{row[key]['median']:.2f} ({row[key]['min']:.2f}–{row[key]['max']:.2f})" for key in timed)
        lines.append(f"| {name} | {row['macs']:.1%} | {row['params']:.1%} | {' | '.join(ranges)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
