"""What fine-tuning costs, and which objective gives a pruned network most of its robustness back.

    python -m benchmarks.finetuning                      # what has no result yet: digits, and the cost of a step
    python -m benchmarks.finetuning --data-dir DIR       # CIFAR-10 too
    python -m benchmarks.finetuning --report             # tables only

`steps`: a step of adversarial training beside the passes that it is made of, and in bf16 with channels_last beside
plain fp32. `precision`: what comes of a pruned network when it is fine-tuned in the one and in the other. `objectives`:
adversarially trained networks, pruned to a quarter of their MACs by MRS, are fine-tuned by each objective for the same
number of passes, and evaluated on test images. `autoattack`: some of these on fewer images by AutoAttack, which takes
up to twenty minutes each on a CPU. Each cell is a file in benchmarks/results/; how far fine-tuning has come is kept in
the cache of tp_mrs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import CONTENDERS, Budget, Subject
from benchmarks.networks import EPS, FINETUNING
from benchmarks.report import bootstrap, lead_text
from benchmarks.run import slug
from benchmarks.tables import RESULTS, fill, markdown, provenance
from benchmarks.timing import timed
from tp_mrs import Evaluation, create_model, evaluate, finetune
from tp_mrs.attacks import parse_eps
from tp_mrs.data import ImageData, load_data, make_loader, random_subset
from tp_mrs.dense import cache_folder
from tp_mrs.files import read_json, write_json
from tp_mrs.finetuning import Finetuning
from tp_mrs.objectives import Objective, ard, awp, rslad
from tp_mrs.storage import checksum, tensors_of

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

MACS, PRUNED_BY = 0.25, "MRS allocate"
PASSES = {"digits": 24, "cifar10": 4}
"""Passes forward and backward for each training image, of the pruned network, that each recipe may spend."""

TEST_IMAGES = {"digits": 500, "cifar10": 1000}
SEEDS = (0, 1, 2)


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
    "MART, PGD-2": Recipe(lambda teacher: "mart", "pgd-2", 4),
    "MART, fast": Recipe(lambda teacher: "mart", "ffgsm", 3),
    "fast AT, AWP": Recipe(lambda teacher: "fgsm-awp", "ffgsm", 3),
    "ARD, fast": Recipe(ard, "ffgsm", 2 + 4 / 3),
    "RSLAD, fast": Recipe(rslad, "ffgsm", 3 + 4 / 3),
    "RSLAD": Recipe(rslad, "pgd-3", 5 + 4 / 3),
    "RSLAD, fast, AWP": Recipe(lambda teacher: awp(rslad(teacher)), "ffgsm", 5 + 8 / 3),
}


PLAIN = "fast AT"
"""The one that others are compared with."""

NETWORK = {"digits": "narrow resnet18", "cifar10": "resnet18"}


def subject_of(data_name: str, folder: str | None, seed: int, network: str | None = None) -> tuple[Subject, nn.Module]:
    """A dense network, and a copy of it that has been pruned once."""
    subject = Subject(load_data(data_name, folder), network or NETWORK[data_name], seed)
    return subject, CONTENDERS[PRUNED_BY](subject, Budget("macs", MACS), 0)


def finetuned(subject: Subject, pruned: nn.Module, label: str) -> tuple[nn.Module, Finetuning]:
    """What a recipe makes of the pruned network; a run that has been made before is read from the cache."""
    student, recipe = copy.deepcopy(pruned), RECIPES[label]
    start = checksum(tensors_of(pruned))[:8]
    changes = {
        "objective": recipe.objective(subject.model),
        "attack": recipe.attack,
        "epochs": PASSES[subject.data.name] / recipe.passes,
        "checkpoint": cache_folder() / "benchmarks" / f"{subject.data.name}-{start}-{slug(label)}.safetensors",
    }
    return student, finetune(student, subject.train_data, **{**subject.finetuning, **changes})


def objectives(data_name: str, folder: str | None, seed: int) -> dict[str, Any]:
    """One dense network, pruned once, fine-tuned by every recipe.

    A recipe keeps the row that it has in the cell, if there the same network was pruned in the same way.
    """
    subject, pruned = subject_of(data_name, folder, seed)
    evaluated = partial(assess, data=subject.data, attacks=["pgd-20"])
    before = {"dense": evaluated(subject.model), "pruned": evaluated(pruned)}
    known = rows_of(f"objectives-{data_name}-{seed}")
    same = bool(known) and all(Evaluation.from_dict(known[label]) == found for label, found in before.items())
    rows = known if same else {label: found.to_dict() for label, found in before.items()}
    for label in [label for label in RECIPES if label not in rows]:
        student, record = finetuned(subject, pruned, label)
        found = evaluated(student)
        rows[label] = {
            "epochs": round(PASSES[data_name] / RECIPES[label].passes, 2),
            "seconds": round(sum(epoch.seconds for epoch in record.history), 1),
            **found.to_dict(),
        }
        print(f"{data_name} seed {seed}  {label:18} {found}", flush=True)
    return {
        "data": data_name,
        "network": subject.network,
        "seed": seed,
        "macs": MACS,
        "passes": PASSES[data_name],
        "pruned_by": PRUNED_BY,
        "training": FINETUNING[data_name],
        "rows": {label: rows[label] for label in (*before, *RECIPES)},
    }


def assess(model: nn.Module, data: ImageData, attacks: Sequence[str], images: int | None = None) -> Evaluation:
    """On a sample of the test images, the same for all."""
    loader = make_loader(random_subset(data.test, images or TEST_IMAGES[data.name], seed=0), batch_size=250)
    return evaluate(model, loader, attacks, eps=parse_eps(EPS[data.name]), latency=False, progress=False)


# --- precision: whether training in bf16 costs robustness -----------------------------------------------------------

PRECISION_EPOCHS = 6
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32", "channels_last": False},
    "bf16, channels_last": {"precision": "bf16", "channels_last": True},
}


def precision(seed: int) -> dict[str, Any]:
    """One pruned network, whose shortcuts are wide enough for channels_last, by fast adversarial training in both."""
    subject, pruned = subject_of("digits", None, seed, "resnet18")
    rows = {}
    for label, changes in PRECISIONS.items():
        student = copy.deepcopy(pruned)
        finetune(student, subject.train_data, **{**subject.finetuning, "epochs": PRECISION_EPOCHS, **changes})
        rows[label] = assess(student, subject.data, ["pgd-20"]).to_dict()
    return {
        "data": "digits",
        "network": subject.network,
        "seed": seed,
        "macs": MACS,
        "pruned_by": PRUNED_BY,
        "epochs": PRECISION_EPOCHS,
        "training": FINETUNING["digits"],
        "rows": rows,
    }


# --- AutoAttack ------------------------------------------------------------------------------------------------------

AUTOATTACKED = ("dense", "fast AT", "MART", "MART, fast")
AUTOATTACK_IMAGES = 100


def autoattack(data_name: str, folder: str | None, seed: int, label: str) -> dict[str, Any]:
    """The dense network, or what a recipe has made of it, on some of the test images."""
    subject, pruned = subject_of(data_name, folder, seed)
    model = subject.model if label == "dense" else finetuned(subject, pruned, label)[0]
    found = assess(model, subject.data, ["pgd-20", "autoattack"], AUTOATTACK_IMAGES)
    return {
        "data": data_name,
        "network": subject.network,
        "seed": seed,
        "macs": MACS,
        "recipe": label,
        "evaluation": found.to_dict(),
    }


# --- running and reporting -------------------------------------------------------------------------------------------


def cells(folders: dict[str, str | None]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """File name and function of everything there is to do, with the data at hand."""
    yield "steps", steps
    for seed in SEEDS:
        yield f"precision-{seed}", partial(precision, seed)
    for data, folder in folders.items():
        for seed in SEEDS:
            yield f"objectives-{data}-{seed}", partial(objectives, data, folder, seed)
    for data, folder in folders.items():
        for seed in SEEDS:
            for label in AUTOATTACKED:
                yield f"autoattack-{data}-{seed}-{slug(label)}", partial(autoattack, data, folder, seed, label)


def path_of(file: str) -> Path:
    return RESULTS / f"finetuning-{file}.json"


def rows_of(file: str) -> dict[str, Any]:
    """What a cell has; nothing, if there is none."""
    path = path_of(file)
    return read_json(path, FORMAT).get("rows", {}) if path.exists() else {}


def finished(file: str) -> bool:
    """Whether the cell is there, and has a row for every recipe if it is one of `objectives`."""
    wanted = RECIPES.keys() if file.startswith("objectives-") else ()
    return path_of(file).exists() and rows_of(file).keys() >= set(wanted)


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
    makers: list[tuple[str, Callable[[list[dict[str, Any]]], str]]] = [
        ("precision", precision_table),
        *((f"objectives-{data}-", table) for data in EPS),
        *((f"autoattack-{data}-", autoattack_table) for data in EPS),
    ]
    parts += [make(runs) for part, make in makers if (runs := results(part))]
    return "\n\n".join(parts)


def table(runs: list[dict[str, Any]]) -> str:
    first, labels = runs[0], max((list(run["rows"]) for run in runs), key=len)
    images = Evaluation.from_dict(first["rows"][PLAIN]).images
    text = (
        f"**{first['data']}**, {first['network']} pruned to {first['macs']:.0%} of the MACs, {first['passes']} passes "
        f"for each training image; mean over {len(runs)} seeds, or those that a recipe was run on, in brackets each; "
        f"{images} test images, intervals as above."
    )
    rows = []
    for label in labels:
        having = [run for run in runs if label in run["rows"]]
        found, recipe = evaluations(having, label), label in RECIPES
        cells = [f"{having[0]['rows'][label]['epochs']:.3g}" if recipe else ""]
        cells += [each_seed([one.accuracy(name) for one in found]) for name in COLUMNS]
        cells.append(lead(found, evaluations(having, PLAIN), "pgd-20") if recipe and label != PLAIN else "")
        rows.append([label, *cells])
    return f"{text}\n\n{markdown(['objective', 'epochs', *COLUMNS.values(), f'PGD-20, less {PLAIN}'], rows)}"


COLUMNS = {"clean": "clean", "pgd-20": "PGD-20"}


def evaluations(runs: list[dict[str, Any]], label: str) -> list[Evaluation]:
    """One for each seed."""
    return [Evaluation.from_dict(run["rows"][label]) for run in runs]


def lead(ones: Sequence[Evaluation], others: Sequence[Evaluation], name: str) -> str:
    """How far the ones are ahead, in points, with its interval; seed by seed on the same images."""
    pairs = zip(ones, others, strict=True)
    return lead_text(bootstrap([one.outcome(name).astype(float) - other.outcome(name) for one, other in pairs]))


def each_seed(accuracies: Sequence[float]) -> str:
    """The mean in %, in brackets each."""
    values = [100 * accuracy for accuracy in accuracies]
    return f"{statistics.mean(values):.1f} ({' '.join(f'{value:.1f}' for value in values)})"


def precision_table(runs: list[dict[str, Any]]) -> str:
    plain, *others = PRECISIONS
    found = {label: evaluations(runs, label) for label in PRECISIONS}
    rows = []
    for name, column in COLUMNS.items():
        cells = [each_seed([each.accuracy(name) for each in found[label]]) for label in PRECISIONS]
        rows.append([column, *cells, *(lead(found[label], found[plain], name) for label in others)])
    first = runs[0]
    text = (
        f"**Precision**: {first['data']}, {first['network']} pruned to {first['macs']:.0%} of the MACs, "
        f"{first['epochs']} epochs of fast AT in either; mean over {len(runs)} seeds, in brackets each seed; "
        f"{found[plain][0].images} test images. The 95% interval of the difference is from a bootstrap over seeds, and "
        "over images within each."
    )
    header = ["accuracy", plain, *(name for label in others for name in (label, f"{label} less {plain}"))]
    return f"{text}\n\n{markdown(header, rows)}"


def autoattack_table(runs: list[dict[str, Any]]) -> str:
    first, images = runs[0], Evaluation.from_dict(runs[0]["evaluation"]).images
    columns = {**COLUMNS, "autoattack": "AutoAttack"}
    found: dict[str, dict[int, Evaluation]] = {label: {} for label in AUTOATTACKED}
    for run in runs:
        found[run["recipe"]][run["seed"]] = Evaluation.from_dict(run["evaluation"])
    rows = []
    for label, seeds in found.items():
        if seeds:
            cells = [each_seed([one.accuracy(name) for one in seeds.values()]) for name in columns]
            both = [seed for seed in seeds if seed in found[PLAIN]] if label in RECIPES and label != PLAIN else []
            ours, plain = ([found[name][seed] for seed in both] for name in (label, PLAIN))
            rows.append([label, *cells, lead(ours, plain, "autoattack") if both else ""])
    text = (
        f"**AutoAttack**, {first['data']}: the dense {first['network']}, and what recipes of the table above make of "
        f"it at {first['macs']:.0%} of the MACs; {images} of the test images, mean over the seeds, in brackets each."
    )
    return f"{text}\n\n{markdown(['objective', *columns.values(), f'AutoAttack, less {PLAIN}'], rows)}"


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
        if not finished(file) and not arguments.report:
            write_json(path_of(file), {"format": FORMAT, **provenance(), **run()})
    fill("finetuning", report())


if __name__ == "__main__":
    main()
