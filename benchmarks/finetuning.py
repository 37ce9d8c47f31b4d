"""What fine-tuning costs, and which objective gives a pruned network most of its robustness back.

    python -m benchmarks.finetuning                      # what has no result yet: digits, and the cost of a step
    python -m benchmarks.finetuning --data-dir DIR       # CIFAR-10 too
    python -m benchmarks.finetuning --report             # tables only

`steps`: a step of adversarial training beside the passes that it is made of, and in bf16 with channels_last beside
plain fp32. `objectives`: adversarially trained networks, pruned to a quarter of their MACs by MRS, are fine-tuned by
each objective for the same number of passes, and evaluated on test images (AutoAttack would take hours on a CPU). Each
network and seed is a file in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import CONTENDERS, MAIN, Budget, Subject
from benchmarks.networks import EPS, FINETUNING
from benchmarks.tables import RESULTS, fill, markdown, provenance
from benchmarks.timing import timed
from tp_mrs import create_model, evaluate, finetune
from tp_mrs.attacks import parse_eps
from tp_mrs.data import ImageData, load_data, make_loader, random_subset
from tp_mrs.files import read_json, write_json
from tp_mrs.objectives import Objective, ard, awp, rslad

FORMAT = "tp_mrs.finetuning_benchmark/1"


# --- steps: what a step costs ----------------------------------------------------------------------------------------

STEPS = (1, 3, 7)
"""Of PGD."""


def steps() -> dict[str, Any]:
    """A narrow resnet18 on random images of 32×32, batches of 128; everything in turn, median of the ratios."""
    torch.manual_seed(0)
    batches = [(torch.rand(128, 3, 32, 32), torch.randint(10, (128,))) for _ in range(4)]
    model = create_model("resnet18", num_classes=10, image_size=32, channels=[16, 32, 64, 128])
    cost: dict[int, list[float]] = {k: [] for k in STEPS}
    faster: dict[int, list[float]] = {k: [] for k in STEPS}
    for turn in range(4):
        for k in STEPS:
            passes = timed(partial(plain_passes, model, batches, k + 1))
            train = partial(finetune, model, batches, objective="pgd", attack=f"pgd-{k}", lr=1e-3, progress=False)
            taken, fast = timed(train), timed(partial(train, precision="bf16", channels_last=True))
            if turn:  # the first one warms up
                cost[k].append(taken / passes)
                faster[k].append(taken / fast)
    return {
        "batch_size": 128,
        "steps_over_passes": {str(k): round(statistics.median(cost[k]), 3) for k in STEPS},
        "bf16_times_faster": {str(k): round(statistics.median(faster[k]), 2) for k in STEPS},
    }


def plain_passes(model: nn.Module, batches: list[tuple[Tensor, Tensor]], passes: int) -> None:
    """So many passes forward and backward for each batch, and nothing else."""
    model.train()
    for images, labels in batches:
        for _ in range(passes):
            F.cross_entropy(model(images.detach().requires_grad_()), labels).backward()


# --- objectives ------------------------------------------------------------------------------------------------------

MACS = 0.25
PASSES = {"digits": 24, "cifar10": 4}
"""Passes forward and backward for each training image, of the pruned network, that each recipe may spend."""

TEST_IMAGES = {"digits": 500, "cifar10": 1000}


class Recipe(NamedTuple):
    """An objective, its attack, and what an image costs: passes of the student, a forward pass counting as a third.

    The teacher's forward pass counts 4/3, as it has four times the MACs. Weight perturbation takes
    the objective's passes, but not the attack's, once more.
    """

    objective: Callable[[nn.Module], str | Objective]
    attack: str
    passes: float


RECIPES: dict[str, Recipe] = {
    "fast AT": Recipe(lambda teacher: "fgsm", "ffgsm", 2),
    "PGD-AT": Recipe(lambda teacher: "pgd", "pgd-3", 4),
    "TRADES": Recipe(lambda teacher: "trades", "tpgd-3", 5 + 1 / 3),
    "MART": Recipe(lambda teacher: "mart", "pgd-3", 5),
    "fast AT, AWP": Recipe(lambda teacher: "fgsm-awp", "ffgsm", 3),
    "ARD, fast": Recipe(ard, "ffgsm", 2 + 4 / 3),
    "RSLAD, fast": Recipe(rslad, "ffgsm", 3 + 4 / 3),
    "RSLAD": Recipe(rslad, "pgd-3", 5 + 4 / 3),
    "RSLAD, fast, AWP": Recipe(lambda teacher: awp(rslad(teacher)), "ffgsm", 5 + 8 / 3),
}


def objectives(data_name: str, folder: str | None, seed: int) -> dict[str, Any]:
    """One dense network, pruned once, fine-tuned by every recipe."""
    data = load_data(data_name, folder)
    name = "narrow resnet18" if data_name == "digits" else "resnet18"
    subject = Subject(data, name, seed)
    teacher = subject.model
    pruned = CONTENDERS[MAIN](subject, Budget("macs", MACS), 0)
    rows = {"dense": assess(teacher, data), "pruned": assess(pruned, data)}
    for label, recipe in RECIPES.items():
        student = copy.deepcopy(pruned)
        epochs = PASSES[data_name] / recipe.passes
        changes = {"objective": recipe.objective(teacher), "attack": recipe.attack, "epochs": epochs}
        seconds = timed(partial(finetune, student, subject.train_data, **{**subject.finetuning, **changes}))
        rows[label] = {"epochs": round(epochs, 2), "seconds": round(seconds, 1), **assess(student, data)}
        print(f"{data_name} seed {seed}  {label:18} {rows[label]}", flush=True)
    return {
        "data": data_name,
        "network": name,
        "seed": seed,
        "macs": MACS,
        "passes": PASSES[data_name],
        "pruned_by": MAIN,
        "training": FINETUNING[data_name],
        "test_images": TEST_IMAGES[data_name],
        "rows": rows,
    }


def assess(model: nn.Module, data: ImageData) -> dict[str, float]:
    """Clean and PGD-20 accuracy."""
    loader = make_loader(random_subset(data.test, TEST_IMAGES[data.name], seed=0), batch_size=250)
    found = evaluate(model, loader, ["pgd-20"], eps=parse_eps(EPS[data.name]), latency=False, progress=False)
    return {"clean": found.clean, "pgd-20": found.robust["pgd-20"]}


# --- running and reporting -------------------------------------------------------------------------------------------


def cells(folders: dict[str, str | None]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """File name and function of everything there is to do, with the data at hand."""
    yield "steps", steps
    for data, folder in folders.items():
        for seed in range(3):
            yield f"objectives-{data}-{seed}", partial(objectives, data, folder, seed)


def path_of(file: str) -> Path:
    return RESULTS / f"finetuning-{file}.json"


def results(part: str) -> list[dict[str, Any]]:
    return [read_json(path, FORMAT) for path in sorted(RESULTS.glob(f"finetuning-{part}*.json"))]


def report() -> str:
    parts = []
    for run in results("steps"):
        cost = ", ".join(f"PGD-{k} {ratio:.2f}" for k, ratio in run["steps_over_passes"].items())
        faster = ", ".join(f"PGD-{k} {ratio:.2f}" for k, ratio in run["bf16_times_faster"].items())
        parts.append(
            f"**A step**, over its k + 1 passes forward and backward, fp32, batches of {run['batch_size']}: {cost}. "
            f"bf16 with channels_last, times faster than plain fp32: {faster}. On {run['device']}."
        )
    for data in EPS:
        runs = results(f"objectives-{data}-")
        if runs:
            parts.append(table(runs))
    return "\n\n".join(parts)


def table(runs: list[dict[str, Any]]) -> str:
    first = runs[0]
    text = (
        f"**{first['data']}**, {first['network']} pruned to {first['macs']:.0%} of the MACs, {first['passes']} passes "
        f"for each training image; mean over {len(runs)} seeds, in brackets each seed; "
        f"{first['test_images']} test images."
    )
    rows = []
    for label, example in first["rows"].items():
        cells = [f"{example['epochs']:.3g}" if "epochs" in example else ""]
        for column in ("clean", "pgd-20"):
            values = [100 * run["rows"][label][column] for run in runs]
            cells.append(f"{statistics.mean(values):.1f} ({' '.join(f'{value:.1f}' for value in values)})")
        rows.append([label, *cells])
    return f"{text}\n\n{markdown(['objective', 'epochs', 'clean', 'PGD-20'], rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with CIFAR-10; without it, digits only")
    parser.add_argument("--report", action="store_true", help="write the tables only")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    folders: dict[str, str | None] = {"digits": None}
    if arguments.data_dir is not None:
        folders["cifar10"] = arguments.data_dir
    for file, run in cells(folders):
        if not path_of(file).exists() and not arguments.report:
            write_json(path_of(file), {"format": FORMAT, **provenance(), **run()})
    fill("finetuning", report())


if __name__ == "__main__":
    main()
