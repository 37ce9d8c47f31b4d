"""How much faster models with half of the MACs are on this machine, and how long loading them takes.

    python -m benchmarks.latency                   # what has no result yet
    python -m benchmarks.latency --data-dir DIR    # also of what contenders make of a network for CIFAR-10

Dense and pruned run in turn in one process. All groups of the models of usual size lose alike, in multiples of 8
channels; the contenders take as many of each group as they like.
"""

from __future__ import annotations

import argparse
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
from benchmarks.contenders import CONTENDERS, Budget, Subject
from benchmarks.tables import RESULTS, fill, markdown, provenance
from benchmarks.timing import timed
from tp_mrs.counting import count
from tp_mrs.data import load_data
from tp_mrs.files import read_json, write_json

RESULT = RESULTS / "latency.json"
FORMAT = "tp_mrs.latency/1"
MODELS = ("resnet18", "vgg16_bn", "mobilevit_xxs")
SIDE, PAIRS, LOADS, ROUND_TO = 224, 5, 7, 8
BATCHES = ((1, 1), (1, 2), (64, 2))
"""Batch size and threads."""


CONTENDERS_RESULT = RESULTS / "latency-contenders.json"
CONTENDERS_FORMAT = "tp_mrs.latency_of_contenders/1"
NAMES = (
    "L2, uniform",
    "L2, global",
    "FPGM, global",
    "BN scale, global",
    "Taylor (adversarial), global",
    "Hessian (adversarial), global",
    "MRSImportance, global",
    "mrpf",
    "L2, uniform, multiples of 8",
    "mrpf, multiples of 8",
)
NETWORK, BUDGET, BATCH, TURNS = ("cifar10", "resnet18"), Budget("macs", 0.5), 64, 21


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with CIFAR-10; without it, the models of usual size only")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if not RESULT.exists():
        models = {name: measure(name) for name in MODELS}
        settings = {"image_size": SIDE, "pairs": PAIRS, "loads": LOADS, "round_to": ROUND_TO, "macs": 0.5}
        write_json(RESULT, {"format": FORMAT, "settings": settings, **provenance(), "models": models})
    if arguments.data_dir and not CONTENDERS_RESULT.exists():
        found = contenders(arguments.data_dir)
        write_json(CONTENDERS_RESULT, {"format": CONTENDERS_FORMAT, **provenance(), **found})
    fill("latency", "\n\n".join([table(), contenders_table()] if CONTENDERS_RESULT.exists() else [table()]))


def contenders(data_dir: str) -> dict[str, Any]:
    """Latency of what contenders make of one network over the dense one's, on one thread."""
    data, network = NETWORK
    subject = Subject(load_data(data, data_dir), network, seed=0)
    torch.set_num_threads(1)
    dense = forward(subject.model.to(memory_format=torch.contiguous_format), BATCH, subject.example)
    found = {}
    for name in NAMES:
        pruned = CONTENDERS[name](subject, BUDGET, 0).to(memory_format=torch.contiguous_format)
        found[name] = paired(forward(pruned, BATCH, subject.example), dense, TURNS)
    settings = {"macs": BUDGET.target, "batch_size": BATCH, "pairs": TURNS}
    return {"data": data, "network": network, "settings": settings, "contenders": found}


def contenders_table() -> str:
    result = read_json(CONTENDERS_RESULT, CONTENDERS_FORMAT)
    settings = result["settings"]
    text = (
        f"Latency of what pruners make of {result['data']}'s narrow {result['network']} (seed 0) at "
        f"{settings['macs']:.0%} of the MACs, divided by the dense one's; batches of {settings['batch_size']}, median "
        f"of {settings['pairs']} pairs and their range. On {result['device']}."
    )
    rows = [[name, span(ratios)] for name, ratios in result["contenders"].items()]
    return f"{text}\n\n{markdown(['pruner', 'latency'], rows)}"


def measure(name: str) -> dict[str, Any]:
    """Ratios pruned / dense: MACs, parameters, latency by batch size; and loading against timm's creation."""
    torch.manual_seed(0)
    dense, pruned = (tp_mrs.create_model(name, num_classes=10).eval() for _ in range(2))
    images = torch.rand(1, 3, SIDE, SIDE)
    halve(pruned, images)
    before, after = count(dense, images), count(pruned, images)
    row: dict[str, Any] = {"macs": round(after.macs / before.macs, 3), "params": round(after.params / before.params, 3)}
    for batch, threads in BATCHES:
        torch.set_num_threads(threads)
        ours, theirs = (forward(model, batch, images) for model in (pruned, dense))
        row[f"batch {batch}, {threads} threads"] = paired(ours, theirs, PAIRS)
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


def forward(model: nn.Module, batch: int, example: Tensor) -> Callable[[], Any]:
    images, repeats = torch.rand(batch, *example.shape[1:]), max(1, 16 // batch)
    model.eval()

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
        lines.append(
            f"| {name} | {row['macs']:.1%} | {row['params']:.1%} | {' | '.join(span(row[key]) for key in timed)} |"
        )
    return "\n".join(lines)


def span(ratios: dict[str, float]) -> str:
    return f"{ratios['median']:.2f} ({ratios['min']:.2f}–{ratios['max']:.2f})"


if __name__ == "__main__":
    main()
