"""What a criterion itself takes: `python -m benchmarks.criterion_time` (`--report` for the text alone).

An untrained resnet18 of full width and the same 16 digits for all; each makes its own adversarial images. All in turn
on one machine, so that ratios count, not seconds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp

from benchmarks import contenders
from benchmarks.contenders import Budget, Subject
from benchmarks.tables import RESULTS, fill, provenance
from benchmarks.timing import timed
from tp_mrs import allocate, create_model, measure_sensitivity
from tp_mrs.attacks import bind
from tp_mrs.data import load_data
from tp_mrs.files import read_json, write_json
from tp_mrs.importance import sorted_copy
from tp_mrs.pruning import build_pruner, rooted_groups

FORMAT = "tp_mrs.criterion_time/1"
PATH = RESULTS / "criterion_time.json"
IMAGES, TURNS = 16, 2


def adversarial_taylor(subject: Subject) -> None:
    """As one would write it with Torch-Pruning alone: attack, one backward pass, the scores of each group."""
    model, importance = subject.model, tp.importance.TaylorImportance()
    perturb = bind(subject.attack, model)
    model.zero_grad()
    for images, labels in subject.calibration:
        F.cross_entropy(model(perturb(images, labels)), labels).backward()
    for group in rooted_groups(build_pruner(model, subject.example)):
        importance(sorted_copy(group.raw))
    model.zero_grad()


def ours(subject: Subject) -> None:
    """Measuring, and the ratios."""
    found = measure_sensitivity(
        subject.model, subject.calibration, subject.attack, example_inputs=subject.example, progress=False
    )
    allocate(subject.model, subject.example, found, macs=0.5)


def prune_and_measure(subject: Subject) -> None:
    """Each group pruned alone, and attacked; and the ratios."""
    allocate(subject.model, subject.example, contenders.tried(subject), macs=0.5)


def whole(subject: Subject, **changes: Any) -> None:
    """`mrpf`, all but fine-tuning."""
    contenders.one_round(**changes)(subject, Budget("macs", 0.5))


CRITERIA: dict[str, Callable[[Subject], None]] = {
    "adversarial Taylor": adversarial_taylor,
    "MRS and ratios": ours,
    "prune and measure": prune_and_measure,
    "mrpf, 1 step, without compensation": partial(whole, iterative_steps=1, compensate=False),
    "mrpf, 1 step": partial(whole, iterative_steps=1),
    "mrpf": whole,
}


def measured() -> dict[str, Any]:
    torch.manual_seed(0)
    data = load_data("digits", None)
    channels, size, _ = data.shape
    model = create_model("resnet18", num_classes=data.num_classes, in_chans=channels, image_size=size).eval()
    seconds: dict[str, list[float]] = {name: [] for name in CRITERIA}
    for _ in range(TURNS):
        for name, criterion in CRITERIA.items():
            subject = Subject(data, "resnet18", 0, model=model, images=IMAGES)  # a new one remembers nothing
            seconds[name].append(timed(partial(criterion, subject)))
    return {name: round(statistics.median(each), 2) for name, each in seconds.items()}


def report() -> str:
    found = read_json(PATH, FORMAT)
    taylor, mine, tried, plain, one, four = (found["seconds"][name] for name in CRITERIA)
    return (
        f"**Time of the criterion itself**, resnet18 of full width, {found['images']} images of 32×32, attack "
        f"included, on {found['device']}: measuring MRS and setting ratios takes {mine / taylor:.2f} times as long as "
        f"adversarial Taylor; pruning each group on trial takes {tried / mine:.1f} times as long as that. All that "
        f"`mrpf` does before fine-tuning takes {plain / taylor:.1f} times as long as adversarial Taylor in one step "
        f"without compensation, {one / taylor:.1f} times with it, and {four / taylor:.1f} times in four steps."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="write the text only")
    if not parser.parse_args().report:
        write_json(PATH, {"format": FORMAT, "images": IMAGES, **provenance(), "seconds": measured()})
    fill("criterion_time", report())


if __name__ == "__main__":
    main()
