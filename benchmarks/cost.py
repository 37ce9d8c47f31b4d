"""What `first_order` costs beside a plain forward and backward pass over the same images.

    python -m benchmarks.cost

Both are timed in turn in one process, adversarial images given; the ratio is what counts.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

from benchmarks.tables import RESULTS, fill, provenance
from tp_mrs import create_model
from tp_mrs.files import read_json, write_json
from tp_mrs.sensitivity import measure

RESULT = RESULTS / "cost.json"
FORMAT = "tp_mrs.cost/1"
REPEATS, BATCHES, SIZE = 7, 4, 64


def forward_backward(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """The least that any gradient-based criterion does."""
    model.zero_grad(set_to_none=True)
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()


def seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=10, image_size=32).eval()
    batches = [(torch.rand(SIZE, 3, 32, 32), torch.randint(10, (SIZE,))) for _ in range(BATCHES)]
    runs = {
        "forward and backward": lambda: forward_backward(model, batches),
        "first_order": lambda: measure(model, batches, torchattacks.VANILA, progress=False),
    }
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(REPEATS + 1)][1:]  # the first warms up
    times = {name: [each[name] for each in rounds] for name in runs}
    pairs = [ours / plain for ours, plain in zip(times["first_order"], times["forward and backward"], strict=True)]
    result = {
        "format": FORMAT,
        "settings": {"architecture": "resnet18", "images": BATCHES * SIZE, "batch_size": SIZE, "repeats": REPEATS},
        **provenance(),
        "seconds": {name: [round(value, 3) for value in values] for name, values in times.items()},
        "ratio": {
            "median": round(statistics.median(pairs), 3),
            "min": round(min(pairs), 3),
            "max": round(max(pairs), 3),
        },
    }
    RESULT.parent.mkdir(exist_ok=True)
    write_json(RESULT, result)
    fill("cost", sentence())


def sentence() -> str:
    """The result in words."""
    result = read_json(RESULT, FORMAT)
    settings, ratio = result["settings"], result["ratio"]
    return (
        f"{settings['architecture']}, {settings['images']} images of 32×32 in batches of {settings['batch_size']}, "
        f"adversarial images given: `first_order` takes **{ratio['median']:.2f}** times a forward and backward pass "
        f"(median of {settings['repeats']}; {ratio['min']:.2f} to {ratio['max']:.2f}), on {result['device']}."
    )


if __name__ == "__main__":
    main()
