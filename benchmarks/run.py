"""Prune adversarially trained networks by every contender to the same budgets, fine-tune alike, and evaluate.

    python -m benchmarks.run --tier smoke --out DIR
    python -m benchmarks.run --tier cpu --data-dir DIR --jobs 2
    python -m benchmarks.run --tier cpu --networks digits/vgg11_bn --seeds 0 --contenders "L2, uniform" "L2, global"
    python -m benchmarks.report

Each cell (network, budget, contender, seed) is a JSON file in benchmarks/results/cells/. What is there is not done
again: a run can be stopped and started at any time, and a wider one adds what is missing, also to cells.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import (
    CALIBRATION_IMAGES,
    CONTENDERS,
    CRITERION_ATTACK,
    TUNINGS,
    Contender,
    Subject,
    tuning_of,
)
from benchmarks.networks import BATCH_SIZE, DEVICE, EPS, FINETUNING, NETWORKS, TRAINING
from benchmarks.tables import RESULTS, provenance
from benchmarks.tiers import MORE, SECOND, TIERS, WITH_AUTOATTACK, Part, Work, points_of
from tp_mrs import evaluate
from tp_mrs.allocation import amount
from tp_mrs.architectures import LAYERS
from tp_mrs.data import load_data, make_loader, random_subset
from tp_mrs.errors import DivergenceError, InputError, check_choice, check_count, check_seed
from tp_mrs.files import check_output_folder, read_json, write_json
from tp_mrs.objectives import name_of
from tp_mrs.storage import checksum, tensors_of

FORMAT = "tp_mrs.pruners/1"
CELLS = RESULTS / "cells"

PruneAndTune = Callable[[float], nn.Module]  # for so many epochs
Assess = Callable[[nn.Module], dict[str, Any]]


# --- a cell ----------------------------------------------------------------------------------------------------------


class Cell:
    """A JSON file, read if it is there and written whenever something is added.

    Raises:
        InputError: what is there was made with other settings, or is no such cell.
    """

    def __init__(self, path: Path, head: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.path = path
        self._head: dict[str, Any] = json.loads(json.dumps({**head, "settings": settings}))
        self.content = self._read()

    def add(self, **found: Any) -> None:
        """To what is there by now: another run may have added to it."""
        content = self._read()
        for name, value in found.items():
            content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
        self.content = content
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"format": FORMAT, **self._head}
        try:
            content = read_json(self.path, FORMAT)
        except InputError as error:
            raise InputError(f"out: {self.path} is damaged, remove it ({error})") from error
        differing = [name for name, value in self._head.items() if content.get(name) != value]
        if differing and {"settings", "retuning"}.issuperset(differing):
            raise InputError(
                f"out: {self.path} was made with other settings, or from another dense network; remove all of its "
                "network and seed, or choose another folder"
            )
        if differing:
            expected = ", ".join(f"{name} {self._head[name]}" for name in differing if name != "settings")
            raise InputError(f"out: expected {self.path} to be the cell of {expected}; remove it, or put it back")
        return content


def path_of(folder: Path, work: Work, contender: str) -> Path:
    """Where its cell lies."""
    return network_folder(folder, work) / work.budget.text / f"{slug(contender)}-{work.seed}.json"


def network_folder(folder: Path, work: Work) -> Path:
    return folder / slug(f"{work.data} {work.network}")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


def settings_of(work: Work, test_images: int) -> dict[str, Any]:
    return {
        **NETWORKS[work.data, work.network],
        "training": TRAINING[work.data],
        "finetuning": FINETUNING[work.data],
        "batch_size": BATCH_SIZE[work.data],
        "eps": EPS[work.data],
        "attack": CRITERION_ATTACK,
        "calibration_images": CALIBRATION_IMAGES,
        "test_images": test_images,
    }


def retuning(name: str, subject: Subject) -> dict[str, Any]:
    """What a contender's fine-tuning is told other than `FINETUNING` says, if anything."""
    tuning = TUNINGS.get(tuning_of(name)[1])
    return {"retuning": {key: name_of(value) for key, value in tuning.changes(subject).items()}} if tuning else {}


def assess(model: nn.Module, subject: Subject, test_images: int, attacks: Sequence[str]) -> dict[str, Any]:
    """Accuracies on so many test images, and whether each of them was right; the model's memory layout may change."""
    test = make_loader(random_subset(subject.data.test, test_images, seed=0), batch_size=250)
    model = model.to(memory_format=torch.channels_last)
    found = evaluate(model, test, attacks, eps=subject.eps, latency=False, progress=False)
    accuracies = {"clean": found.clean, **found.robust}
    return {"images": found.images, **accuracies, "outcomes": found.outcomes, "warnings": found.warnings}


def sizes(model: nn.Module, subject: Subject) -> dict[str, Any]:
    """MACs and parameters as fractions of the dense network's, and the output channels of each layer."""
    layers = {name: len(layer.weight) for name, layer in model.named_modules() if isinstance(layer, LAYERS)}
    measures = ("macs", "params")
    dense, found = ([amount(each, subject.example, name) for name in measures] for each in (subject.model, model))
    return {name: f / d for name, f, d in zip(measures, found, dense, strict=True)} | {"widths": layers}


def do(
    work: Work,
    epochs: Sequence[float],
    contenders: Mapping[str, Contender],
    folder: Path,
    data_dir: str | None = None,
    *,
    test_images: int = 500,
    attacks: Sequence[str] = ("pgd-20",),
    second: Mapping[str, int] | None = None,
) -> None:
    """All missing cells of one budget and seed, and the missing points of their curves.

    Args:
        work: what to prune, and to what.
        epochs: of fine-tuning; 0 for none.
        contenders: by name, those of `CONTENDERS` and your own.
        folder: for the cells; `report.comparisons` reads them.
        data_dir: folder with the data sets; digits need none.
        test_images: how many to evaluate on.
        attacks: to evaluate with.
        second: on how many test images to evaluate once more, by each of `SECOND` that is wanted; by AutoAttack a
            hundred take minutes on a CPU.

    Raises:
        InputError: a cell there was made with other settings, or from another dense network: one that is trained on
            another kind of machine differs in its last bits, and then in more; or was evaluated a second time on
            another number of images.
    """
    subject = Subject(load_data(work.data, data_dir if work.data != "digits" else None), work.network, work.seed)
    head = {"data": work.data, "network": work.network, "seed": work.seed}
    settings = {**settings_of(work, test_images), "dense": checksum(tensors_of(subject.model))}
    measures: dict[str, Assess] = {"curve": partial(assess, subject=subject, test_images=test_images, attacks=attacks)}
    for measure, images in (second or {}).items():
        measures[measure] = partial(assess, subject=subject, test_images=images, attacks=SECOND[measure])
    dense = Cell(network_folder(folder, work) / f"dense-{work.seed}.json", head, settings)
    for measure, images in (second or {}).items():
        wanted = min(images, len(subject.data.test))  # type: ignore[arg-type]
        there = dense.content.get(measure, {"0": {"images": wanted}})["0"]["images"]
        if there != wanted:
            raise InputError(
                f"out: {dense.path} was evaluated once more ({measure}) on {there} images, not {wanted}; ask for as "
                "many, or choose another folder"
            )
    for measure, assessed in measures.items():
        if ("clean" if measure == "curve" else measure) not in dense.content:
            found = {**assessed(copy.deepcopy(subject.model)), **provenance(DEVICE)}
            dense.add(**({**found, **sizes(subject.model, subject)} if measure == "curve" else {measure: {"0": found}}))
    for name, contender in contenders.items():
        about = {**head, "contender": name, "budget": work.budget, **retuning(name, subject)}
        cell = Cell(path_of(folder, work, name), about, settings)
        for point in points_of(name, epochs):
            missing = lacking(cell.content, point, measures)
            if missing:
                start = time.perf_counter()
                chosen = {measure: measures[measure] for measure in missing}
                shown = fill_in(cell, point, subject, partial(contender, subject, work.budget), chosen)
                seconds = time.perf_counter() - start
                where = f"{work.data}/{work.network} {work.budget.text} seed {work.seed}"
                print(f"{where}  {name}, {point:g} epochs: {shown}  ({seconds:.0f} s)", flush=True)


def lacking(content: Mapping[str, Any], point: float, measures: Iterable[str]) -> list[str]:
    """Those of the measures that a cell has no results by, unless its contender cannot be run there."""
    return [measure for measure in measures if "failed" not in content and f"{point:g}" not in content.get(measure, {})]


def fill_in(cell: Cell, point: float, subject: Subject, prune: PruneAndTune, measures: Mapping[str, Assess]) -> str:
    """Prune, fine-tune, evaluate; returns what to show of it."""
    try:
        model = prune(point)
    except InputError as error:
        cell.add(failed=str(error), **provenance(DEVICE))
        return str(error)
    except DivergenceError as error:  # with other numbers of epochs it may not
        return str(error)
    shown = []
    for name, assessed in measures.items():
        found = assessed(model)
        cell.add(**sizes(model, subject), **{name: {f"{point:g}": {**found, **provenance(DEVICE)}}})
        shown += [f"{attack} {100 * value:.1f}" for attack, value in found.items() if isinstance(value, float)]
    return ", ".join(shown)


# --- running ---------------------------------------------------------------------------------------------------------


def at_hand(names: Iterable[str], data_dir: str | None) -> set[str]:
    """Which of these data sets can be loaded; says why the others are left out.

    Raises:
        InputError: it is none of them.
    """
    found, reasons = set(), []
    for name in sorted(names):
        try:
            load_data(name, data_dir if name != "digits" else None)
            found.add(name)
        except InputError as error:
            reasons.append(f"{name} is left out: {error}")
    if not found:
        raise InputError(f"data-dir: nothing is left to do; {'; '.join(reasons)}")
    print(*reasons, sep="\n", end="\n" * bool(reasons), flush=True)
    return found


def _do_parts(parts: Sequence[Part], seed: int, folder: Path, data_dir: str | None) -> None:
    """`do` in another process, which names reach, and functions don't.

    Raises:
        InputError: something was not done, after all the rest was.
    """
    errors: dict[str, None] = {}
    for part in parts:
        contenders = {name: CONTENDERS[name] for name in part.contenders}
        for work in part.work(seed):
            try:
                do(
                    work,
                    part.epochs,
                    contenders,
                    folder,
                    data_dir,
                    test_images=part.test_images,
                    attacks=part.attacks,
                    second=part.second,
                )
            except InputError as error:
                errors[str(error)] = None
    if errors:
        raise InputError("\nerror: ".join(errors))


def in_processes(tasks: Iterable[Callable[[], None]], jobs: int) -> bool:
    """Do all of them, so many at a time, with the cores shared; whether none met an `InputError`, which is shown."""
    failed = 0
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start, (threads,)) as pool:
        for done in as_completed([pool.submit(task) for task in tasks]):
            try:
                done.result()
            except InputError as error:  # the others go on
                failed += 1
                print(f"error: {error}", file=sys.stderr, flush=True)
    return not failed


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A killed run leaves nothing behind that goes on."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def check_each(name: str, values: Iterable[str], choices: Iterable[str]) -> None:
    """Raise `InputError` unless each of the values is one of the choices."""
    options = list(dict.fromkeys(choices))
    for value in values:
        check_choice(name, value, options)


def selected(tier: Sequence[Part], arguments: argparse.Namespace) -> list[Part]:
    """What was asked for of a tier.

    Raises:
        InputError: it is none of the tier's.
    """
    for name, low in (("jobs", 1), ("more_images", 0), ("autoattack", 0)):
        check_count(name, getattr(arguments, name), low=low)
    for seed in arguments.seeds or ():
        check_seed(seed)
    check_each("contenders", arguments.contenders or (), CONTENDERS)
    parts = list(tier)
    if arguments.networks:
        check_each("networks", arguments.networks, ("/".join(part.subject) for part in parts))
        parts = [part for part in parts if "/".join(part.subject) in arguments.networks]
    if arguments.budgets:
        check_each("budgets", arguments.budgets, (budget.text for part in parts for budget in part.budgets))
        parts = [replace(part, budgets=[of for of in part.budgets if of.text in arguments.budgets]) for part in parts]
        parts = [part for part in parts if part.budgets]
    if arguments.epochs:
        check_each("epochs", map("{:g}".format, arguments.epochs), (f"{at:g}" for part in parts for at in part.epochs))
        parts = [replace(part, epochs=[at for at in part.epochs if at in arguments.epochs]) for part in parts]
        parts = [part for part in parts if part.epochs]
    second = {MORE: arguments.more_images, WITH_AUTOATTACK: arguments.autoattack}
    instead = {
        "seeds": arguments.seeds,
        "contenders": arguments.contenders,
        "second": {measure: images for measure, images in second.items() if images},
    }
    parts = [replace(part, **{name: value for name, value in instead.items() if value}) for part in parts]
    if not any(True for part in parts for _ in part.points()):
        raise InputError(
            f"epochs: {', '.join(parts[0].contenders)} are other ways of fine-tuning; ask for some, or leave it out"
        )
    return parts


def to_do(parts: Sequence[Part], folder: Path) -> dict[tuple[Work, str, float, str], bool]:
    """Each point and measure of the parts → whether it is missing."""
    found = {}
    for part in parts:
        for work, name, point in part.points():
            path = path_of(folder, work, name)
            try:
                content = read_json(path, FORMAT) if path.exists() else {}
            except InputError:  # `do` says what is wrong with it
                content = {}
            for measure in ("curve", *part.second):
                found[work, name, point, measure] = bool(lacking(content, point, [measure]))
    return found


def tasks(parts: Sequence[Part]) -> dict[tuple[int, tuple[str, str]], list[Part]]:
    """Seed and network → its parts, for one process, which trains the dense network if need be. In order of seeds."""
    found: dict[tuple[int, tuple[str, str]], list[Part]] = {}
    for seed in sorted({seed for part in parts for seed in part.seeds}):
        for part in parts:
            if seed in part.seeds:
                found.setdefault((seed, part.subject), []).append(part)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=TIERS, default="smoke")
    parser.add_argument("--data-dir", help="folder with the data sets; without it, digits only")
    parser.add_argument("--out", type=Path, default=CELLS, help="folder for the cells (default: the committed ones)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, which share the cores")
    parser.add_argument("--networks", nargs="+", metavar="DATA/NAME", help="only these of the tier")
    parser.add_argument("--budgets", nargs="+", metavar="macs-50", help="only these of the tier")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the tier's")
    parser.add_argument("--epochs", type=float, nargs="+", help="only these of the tier")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="instead of the tier's")
    parser.add_argument("--more-images", type=int, default=0, metavar="IMAGES", help="evaluate on so many, too")
    parser.add_argument("--autoattack", type=int, default=0, metavar="IMAGES", help="evaluate by it, too, on so many")
    arguments = parser.parse_args()
    try:
        parts = selected(TIERS[arguments.tier], arguments)
        folder = check_output_folder(arguments.out)
        there = at_hand({part.subject[0] for part in parts}, arguments.data_dir)
    except InputError as error:
        parser.error(str(error))
    parts = [part for part in parts if part.subject[0] in there]
    missing = to_do(parts, folder)
    print(f"{len(missing)} points, of which {sum(missing.values())} are missing", flush=True)
    todo = [partial(_do_parts, of, seed, folder, arguments.data_dir) for (seed, _), of in tasks(parts).items()]
    sys.exit(0 if in_processes(todo, arguments.jobs) else 1)


if __name__ == "__main__":
    main()
