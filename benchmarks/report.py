"""Tables and plots of the cells that `python -m benchmarks.run` has made: `python -m benchmarks.report`.

The same cells give the same bytes. A difference is between two contenders on the same images and from the same dense
networks; its 95% interval comes from a bootstrap over seeds and images. Two or three seeds say little of what others
would give, so that intervals are rather too narrow; with one seed they are over images only.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import (
    ABLATIONS,
    BESIDE,
    COMPENSATED,
    CONTENDERS,
    MAIN,
    OTHERS,
    OURS,
    TUNINGS,
    Budget,
    retuned,
    tuning_of,
)
from benchmarks.run import CELLS, FORMAT, path_of
from benchmarks.tables import FOLDER, RESULTS, fill, markdown
from benchmarks.tiers import MORE, SECOND, Work
from tp_mrs.errors import InputError
from tp_mrs.files import check_output_folder, read_json, write_bytes
from tp_mrs.plotting import BLUE, GREEN, ORANGE

ATTACK = "pgd-20"
COLUMNS = {"clean": "clean", ATTACK: "PGD-20", "autoattack": "AutoAttack"}
MEASURES = ("curve", *SECOND)

MAINS = tuple(retuned(MAIN, tuning) for tuning in ("", *TUNINGS))
"""Ours, by each way of fine-tuning: others are compared with the one that is fine-tuned alike."""

WHOLE = "MRS allocate"
PARTS = (*ABLATIONS, *(name for name in OURS if name.startswith(f"{WHOLE} + ")))
"""Of these, the variants of `WHOLE`: with other scores of groups, another alpha, or another base."""

HELD_OUT = {
    "cifar10, resnet18": (2,),
    "digits, narrow resnet18": (3, 4),
    "digits, vgg11_bn": (1, 2),
    "digits, mobilevit_xxs": (1, 2),
}
"""Data and network → seeds that nothing was chosen by."""

RESAMPLES = 2000
FEWEST_POINTS = 3
"""Of a curve over the epochs of fine-tuning."""

GREY = "#999999"
PANEL_WIDTH, PANEL_HEIGHT, STRIP_HEIGHT, LABEL_WIDTH = 4.6, 3.6, 3.4, 2.8
"""In inches."""

PANELS_IN_A_ROW = 2


class Key(NamedTuple):
    """What contenders are compared on."""

    data: str
    network: str
    measure: str
    target: float

    @property
    def subject(self) -> str:
        return f"{self.data}, {self.network}"

    def __str__(self) -> str:
        return f"{self.target:.0%} of the {'MACs' if self.measure == 'macs' else self.measure}"


@dataclass(frozen=True)
class Comparison:
    """All cells of one network and budget: contender → seed → cell; and the dense networks, by seed."""

    key: Key
    cells: dict[str, dict[int, dict[str, Any]]]
    dense: dict[int, dict[str, Any]]

    def points(self) -> list[str]:
        """Epochs of fine-tuning that any contender has results for."""
        found = {point for seeds in self.cells.values() for cell in seeds.values() for point in cell.get("curve", {})}
        return sorted(found, key=float)

    def seeds(self, contender: str, point: str) -> list[int]:
        return sorted(seed for seed, cell in self.cells.get(contender, {}).items() if point in cell.get("curve", {}))

    @property
    def names(self) -> list[str]:
        """Of the contenders with cells: in the order of `CONTENDERS`, then those of your own."""
        return [*(name for name in CONTENDERS if name in self.cells), *sorted(set(self.cells) - set(CONTENDERS))]

    def common(self, point: str, of: str = MAIN) -> list[str]:
        """Contenders with results for all seeds that this one has."""
        wanted = self.seeds(of, point)
        return [name for name in self.names if wanted and set(wanted) <= set(self.seeds(name, point))]

    def alike(self, point: str, of: str = MAIN) -> list[str]:
        """Those in common that are fine-tuned as this one is."""
        return [name for name in self.common(point, of) if tuning_of(name)[1] == tuning_of(of)[1]]

    def shared(self, contender: str, point: str, of: str = MAIN) -> list[int]:
        """Seeds that both have results for."""
        return sorted(set(self.seeds(contender, point)) & set(self.seeds(of, point)))

    def only(self, seeds: Iterable[int]) -> Comparison:
        """The same of these seeds."""
        wanted = set(seeds)
        cells = {name: {seed: cell for seed, cell in of.items() if seed in wanted} for name, of in self.cells.items()}
        return replace(self, cells={name: of for name, of in cells.items() if of})

    def whole_curve(self, contender: str = MAIN) -> list[int]:
        """Seeds with results for every point that the main contender has."""
        points = [point for point in self.points() if self.seeds(MAIN, point)]
        return sorted(set.intersection(*(set(self.seeds(contender, point)) for point in points))) if points else []

    def accuracy(self, contender: str, point: str, attack: str = ATTACK, seeds: Iterable[int] | None = None) -> float:
        """Mean over seeds, in %; over all there are, unless told which."""
        seeds = self.seeds(contender, point) if seeds is None else seeds
        return 100 * statistics.mean(self.cells[contender][seed]["curve"][point][attack] for seed in seeds)

    def size(self, contender: str, measure: str, seeds: Iterable[int] | None = None) -> float:
        """Mean over seeds, in % of the dense network's; over all there are, unless told which."""
        cells = self.cells[contender]
        seeds = [seed for seed, cell in cells.items() if measure in cell] if seeds is None else seeds
        return 100 * statistics.mean(cells[seed][measure] for seed in seeds)

    def lead(self, contender: str, point: str, of: str = MAIN, attack: str = ATTACK) -> tuple[float, float, float]:
        """The robust accuracy of one less the contender's, in points, and its 95% interval; on the seeds of both."""
        seeds = self.shared(contender, point, of)
        ours, theirs = ([right(self.cells[name][seed], point, attack) for seed in seeds] for name in (of, contender))
        return bootstrap([one - other for one, other in zip(ours, theirs, strict=True)])

    def dense_accuracy(self, seeds: Iterable[int], attack: str = ATTACK) -> float:
        """Accuracy of the dense networks, mean in %."""
        return 100 * statistics.mean(self.dense[seed][attack] for seed in seeds)

    def others(self, point: str, of: str = MAIN) -> list[str]:
        """Of `OTHERS`, those with results for all seeds that this one has, the most robust first: it is favoured."""
        found, seeds = [name for name in self.alike(point, of) if tuning_of(name)[0] in OTHERS], self.seeds(of, point)
        return sorted(found, key=lambda name: -self.accuracy(name, point, seeds=seeds))


def right(cell: dict[str, Any], point: str, attack: str = ATTACK, measure: str = "curve") -> np.ndarray[Any, Any]:
    """Of each test image, 1.0 if it was classified correctly under attack, else 0.0."""
    found = cell[measure][point]
    packed = np.frombuffer(bytes.fromhex(found["outcomes"][attack]), dtype=np.uint8)
    return np.unpackbits(packed, count=found.get("images", cell["settings"]["test_images"])).astype(float)


def bootstrap(samples: Sequence[np.ndarray[Any, Any]]) -> tuple[float, float, float]:
    """Mean in points and 95% interval, resampling seeds and images; each seed's values are of the same images."""
    random, values = np.random.default_rng(0), np.stack(samples)
    seeds, images = values.shape
    drawn_images = random.integers(images, size=(RESAMPLES, images))
    means = np.stack([own[drawn_images].mean(axis=1) for own in values])
    drawn = np.take_along_axis(means, random.integers(seeds, size=(seeds, RESAMPLES)), axis=0).mean(axis=0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return 100 * float(values.mean()), 100 * float(low), 100 * float(high)


def comparisons(folder: Path) -> list[Comparison]:
    """All there is, by network and budget.

    Raises:
        InputError: there is nothing, or cells do not fit each other.
    """
    found: dict[Key, dict[str, dict[int, dict[str, Any]]]] = {}
    dense: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/dense-*.json")):
        cell = read_cell(path)
        dense.setdefault((cell["data"], cell["network"]), {})[cell["seed"]] = cell
    for subject, of in dense.items():
        for measure in SECOND:
            images = {cell[measure]["0"]["images"] for cell in of.values() if measure in cell}
            if len(images) > 1:
                raise InputError(
                    f"cells: {' '.join(subject)} has {measure} on {' and on '.join(map(str, sorted(images)))} images; "
                    "remove those of some seeds, and run again"
                )
        if len({cell["settings"]["test_images"] for cell in of.values()}) > 1:
            raise InputError(f"cells: seeds of {' '.join(subject)} have other numbers of test images; remove some")
    for path in sorted(folder.glob("*/*/*.json")):
        cell = read_cell(path)
        work = Work(cell["data"], cell["network"], Budget(*cell["budget"]), cell["seed"])
        if path != path_of(folder, work, cell["contender"]):
            raise InputError(f"cells: {path} is the cell of {cell['contender']} of seed {work.seed}; put it back")
        start = dense.get((work.data, work.network), {}).get(work.seed)
        if start is None or start["settings"] != cell["settings"]:
            raise InputError(
                f"cells: {path} and its dense-{work.seed}.json were not made by the same settings; run again what is "
                "missing, or remove what is old"
            )
        key = Key(work.data, work.network, *work.budget)
        found.setdefault(key, {}).setdefault(cell["contender"], {})[work.seed] = cell
    if not found:
        raise InputError(f"cells: {folder} has none; make some by python -m benchmarks.run --out {folder}")
    order = sorted(found, key=lambda key: (key.data, key.network, key.measure, -key.target))
    return [Comparison(key, found[key], dense[key.data, key.network]) for key in order]


def read_cell(path: Path) -> dict[str, Any]:
    """What a file holds.

    Raises:
        InputError: it is no whole cell, or says other accuracies than its outcomes.
    """
    try:
        cell = read_json(path, FORMAT)
        fault = fault_of(cell, dense=path.name.startswith("dense-"))
    except (InputError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"cells: {path} is no whole cell ({error!r}); remove it, and run again") from error
    if fault:
        raise InputError(f"cells: {path} {fault}; remove it, and run again")
    return cell


def fault_of(cell: dict[str, Any], *, dense: bool) -> str | None:
    """What is wrong with what a cell says, if anything."""
    needed = ["data", "network", "seed", "settings", *([] if dense else ["contender", "budget"])]
    missing = [name for name in needed if name not in cell]
    if missing:
        return f"has no {missing[0]}"
    if dense:
        measures = {"curve": {"0": cell}} | {measure: cell[measure] for measure in SECOND if measure in cell}
    else:
        measures = {measure: cell[measure] for measure in MEASURES if cell.get(measure)}
    if not measures and "failed" not in cell:
        return "has no results"
    absent = [name for name in ("macs", "params", "widths") if measures and name not in cell]
    if absent:
        return f"has no {absent[0]}"
    for measure, points in measures.items():
        for point, found in points.items():
            float(point)
            outcomes = {**cell, measure: points}
            for attack in {"clean", ATTACK, *found["outcomes"]}:
                if not math.isclose(found[attack], right(outcomes, point, attack, measure).mean(), abs_tol=1e-6):
                    return f"says another accuracy than its outcomes ({measure}, {point}, {attack})"
    return None


def by_subject(found: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    groups: dict[str, list[Comparison]] = {}
    for comparison in found:
        groups.setdefault(comparison.key.subject, []).append(comparison)
    return groups


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(found: Sequence[Comparison]) -> str:
    """All of them."""
    parts = [summary(found), held_out(found), rank_table(found), *map(ablation, found), *map(recovery, found)]
    parts += [second_tables(comparison, measure) for comparison in found for measure in SECOND]
    parts += map(budget_table, found)
    return "\n\n".join(part for part in parts if part)


def summary(found: Iterable[Comparison], *, details: bool = True) -> str:
    """Ours beside the best of the others at each budget: right after pruning, and after the most of fine-tuning.

    Of what is fine-tuned by one objective, the same points are shown as by another; on more images, where there are
    more. With `details`, each seed's difference and both sizes, too.
    """
    rows = []
    for comparison in found:
        compared = {ours: [point for point in comparison.points() if comparison.others(point, ours)] for ours in MAINS}
        ends = {point for points in compared.values() for point in (*points[:1], *points[-1:])}
        rows += [
            summary_row(on_more_images(comparison, ours, point), ours, point)
            for point in comparison.points()
            for ours, points in compared.items()
            if point in ends.intersection(points)
        ]
    less = f"PGD-20, {MAIN} less this"
    header = [
        "network, budget",
        "fine-tuning",
        "seeds × images",
        "dense: clean / PGD-20",
        MAIN,
        BESIDE,
        less,
        "best other, of how many",
        less,
        "in each seed",
        f"MACs / params left: {MAIN}, this",
    ]
    wanted = slice(None if details else -2)
    return markdown(header[wanted], [row[wanted] for row in rows]) if rows else ""


def on_more_images(comparison: Comparison, ours: str, point: str) -> Comparison:
    """The same by `MORE`, if ours and the best other have it on all seeds; else as it is."""
    more, seeds = second_look(comparison, MORE), set(comparison.seeds(ours, point))
    best = comparison.others(point, ours)[0]
    return more if seeds <= set(more.dense) and seeds <= set(more.shared(best, point, ours)) else comparison


def summary_row(comparison: Comparison, ours: str, point: str) -> list[str]:
    seeds, others = comparison.seeds(ours, point), comparison.others(point, ours)
    tuning = tuning_of(ours)[1]
    beside = retuned(BESIDE, tuning)
    has_beside = beside in comparison.common(point, ours)

    def accuracies(name: str) -> str:
        return " / ".join(f"{comparison.accuracy(name, point, attack, seeds):.1f}" for attack in ("clean", ATTACK))

    def sizes(name: str) -> str:
        return " / ".join(f"{comparison.size(name, measure, seeds):.1f}" for measure in ("macs", "params"))

    return [
        f"{comparison.key.subject}, {comparison.key}",
        f"{epochs_text(point)}, {tuning}" if tuning else epochs_text(point),
        f"{len(seeds)} × {len(right(comparison.cells[ours][seeds[0]], point)):,}",
        " / ".join(f"{comparison.dense_accuracy(seeds, attack):.1f}" for attack in ("clean", ATTACK)),
        accuracies(ours),
        *((accuracies(beside), lead_text(comparison.lead(beside, point, ours))) if has_beside else ("", "")),
        f"{accuracies(others[0])} ({tuning_of(others[0])[0]}; {len(others)})",
        lead_text(comparison.lead(others[0], point, ours)),
        signed([comparison.only([seed]).lead(others[0], point, ours)[0] for seed in seeds]),
        f"{sizes(ours)}, {sizes(others[0])}",
    ]


def label(name: str) -> str:
    """Ours stand out."""
    return f"**{name}**" if tuning_of(name)[0] in OURS else name


def held_out(found: Iterable[Comparison]) -> str:
    """The summary, of the seeds alone that nothing was chosen by."""
    table = summary(one.only(HELD_OUT[one.key.subject]) for one in found if one.key.subject in HELD_OUT)
    seeds = "; ".join(f"{subject}: {' and '.join(map(str, those))}" for subject, those in HELD_OUT.items())
    return table and folded(f"**The same on seeds that nothing was chosen by** ({seeds})", table)


def epochs_text(point: str) -> str:
    return "none" if float(point) == 0 else f"{point} epoch{'s' if float(point) != 1 else ''}"


def seeds_text(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}"


def lead_text(lead: tuple[float, float, float]) -> str:
    mean, low, high = lead
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def ablation(comparison: Comparison) -> str:
    """What becomes of the criterion without a part of it: at once, and without compensation."""
    names, seeds = [name for name in comparison.common("0", WHOLE) if name in PARTS], comparison.seeds(WHOLE, "0")
    if not names:
        return ""
    rows = []
    for name in (WHOLE, *names):
        differences = [comparison.only([seed]).lead(WHOLE, "0", name)[0] for seed in seeds]
        rows.append(
            [
                label(name),
                f"{comparison.accuracy(name, '0', seeds=seeds):.1f}",
                *(["", ""] if name == WHOLE else [lead_text(comparison.lead(WHOLE, "0", name)), signed(differences)]),
            ]
        )
    title = (
        f"**Parts of the criterion**, {comparison.key.subject}, {comparison.key}, right after pruning, without "
        f"compensation and in one step; {seeds_text(seeds)}."
    )
    return f"{title}\n\n{markdown(['', 'PGD-20', f'this less {WHOLE}', 'in each seed'], rows)}"


def signed(values: Iterable[float]) -> str:
    return " ".join(f"{value:+.1f}" for value in values)


def recovery(comparison: Comparison) -> str:
    """Epochs of fine-tuning, read off the curves, that it takes to come within 3 points of the dense networks."""
    points = [point for point in comparison.points() if comparison.seeds(MAIN, point)]
    if len(points) < FEWEST_POINTS:
        return ""
    seeds = comparison.whole_curve()
    names = [name for name in comparison.names if seeds and set(seeds) <= set(comparison.whole_curve(name))]
    if not names:
        return ""
    dense = comparison.dense_accuracy(seeds)
    epochs = [float(point) for point in points]
    rows = []
    for name in names:
        curve = [comparison.accuracy(name, point, seeds=seeds) for point in points]
        needed = crossing(epochs, curve, dense - 3)
        shown = f"more than {points[-1]}" if needed is None else f"{needed:.2f}"
        rows.append([label(name), shown, *(f"{value:.1f}" for value in curve)])
    title = (
        f"**Recovery**, {comparison.key.subject}, {comparison.key}: epochs of fine-tuning to PGD-20 accuracy "
        f"within 3 points of the dense networks' {dense:.1f}, on a straight line between the measured; and after each. "
        f"Mean over {seeds_text(seeds)}."
    )
    return f"{title}\n\n{markdown(['', 'epochs needed', *map(epochs_text, points)], rows)}"


def second_look(comparison: Comparison, measure: str) -> Comparison:
    """What was evaluated a second time, by one of `SECOND`, in place of the curves."""
    cells = {
        name: {seed: {**cell, "curve": cell.get(measure, {})} for seed, cell in of.items()}
        for name, of in comparison.cells.items()
    }
    dense = {seed: cell[measure]["0"] for seed, cell in comparison.dense.items() if measure in cell}
    return replace(comparison, cells=cells, dense=dense)


def second_tables(comparison: Comparison, measure: str) -> str:
    """Contenders that were evaluated a second time, after each number of epochs."""
    found = second_look(comparison, measure)
    at = itertools.product(found.points(), MAINS)
    return "\n\n".join(filter(None, (second_table(found, point, ours, SECOND[measure][-1]) for point, ours in at)))


def second_table(found: Comparison, point: str, ours: str, attack: str) -> str:
    """A table by this attack; nothing where there is none to compare with."""
    tuning = tuning_of(ours)[1]
    names, seeds = found.alike(point, ours), found.seeds(ours, point)
    if len(names) < 2:
        return ""
    columns = [column for column in COLUMNS if column in found.cells[ours][seeds[0]]["curve"][point]]
    rows = []
    if set(seeds) <= set(found.dense):
        rows.append(["dense", *(f"{found.dense_accuracy(seeds, column):.1f}" for column in columns), "", ""])
    for name in names:
        accuracies = [f"{found.accuracy(name, point, column, seeds):.1f}" for column in columns]
        leads = ["" if name == ours else lead_text(found.lead(name, point, ours, of)) for of in ("clean", attack)]
        rows.append([label(name), *accuracies, *leads])
    images = found.cells[ours][seeds[0]]["curve"][point]["images"]
    when = f"after {epochs_text(point)} of fine-tuning" if float(point) else "right after pruning"
    when += f" by {tuning}" if tuning else ""
    title = (
        f"**{COLUMNS[attack]}**, {found.key.subject}, {found.key}, {when}: {images:,} test images, {seeds_text(seeds)}."
    )
    leads = [f"{ours} less this, {COLUMNS[of]}" for of in ("clean", attack)]
    header = ["", *(COLUMNS[column] for column in columns), *leads]
    return f"{title}\n\n{markdown(header, rows)}"


def crossing(xs: Sequence[float], ys: Sequence[float], level: float) -> float | None:
    """Where the line through these points first reaches `level`; None if it never does."""
    if ys[0] >= level:
        return xs[0]
    for left, right in itertools.pairwise(zip(xs, ys, strict=True)):
        if right[1] >= level:
            return left[0] + (right[0] - left[0]) * (level - left[1]) / (right[1] - left[1])
    return None


def budget_table(comparison: Comparison) -> str:
    """Every contender at one budget, less ours with the same fine-tuning."""
    points = comparison.points()
    columns = [column for column in COLUMNS if all(column in cell for cell in comparison.dense.values())]
    most = {point: max((comparison.seeds(name, point) for name in comparison.names), key=len) for point in points}
    compared = {point: comparison.seeds(MAIN, point) or most[point] for point in points}
    header = ["", "MACs", "params"]
    for point in points:
        name = "right after pruning" if float(point) == 0 else epochs_text(point)
        shown = f"{name}, {seeds_text(compared[point])}"
        header += [f"{shown}: {' / '.join(COLUMNS[column] for column in columns)}", f"{MAIN} less this"]
    rows = []
    for name in comparison.names:
        cells = comparison.cells[name]
        if not any("curve" in cell for cell in cells.values()):
            continue
        row = [label(name)]
        row += [f"{comparison.size(name, measure):.1f}" for measure in ("macs", "params")]
        for point in points:
            seeds = [seed for seed in comparison.seeds(name, point) if seed in compared[point]]
            accuracies = " / ".join(f"{comparison.accuracy(name, point, of, seeds):.1f}" for of in columns if seeds)
            fewer = f" ({seeds_text(seeds)})" if seeds and len(seeds) < len(compared[point]) else ""
            row.append(accuracies + fewer)
            ours = retuned(MAIN, tuning_of(name)[1])
            comparable = name != ours and comparison.shared(name, point, ours)
            row.append(lead_text(comparison.lead(name, point, ours)) if comparable else "")
        rows.append(row)
    first = next(iter(comparison.dense.values()))
    dense = ", ".join(
        " / ".join(f"{100 * cell[column]:.1f}" for column in columns) for cell in comparison.dense.values()
    )
    text = (
        f"**{comparison.key.subject}, {comparison.key}**; eps {first['settings']['eps']}, "
        f"{first['settings']['test_images']} test images, dense {dense} "
        f"({' / '.join(COLUMNS[column] for column in columns)} of each seed)."
    )
    failed = {name: cell["failed"] for name, of in comparison.cells.items() for cell in of.values() if "failed" in cell}
    notes = "".join(f"\n\n{name}: {why}" for name, why in failed.items())
    return folded(text, f"{markdown(header, rows)}{notes}")


def folded(title: str, text: str) -> str:
    """Shown when the title is clicked, on GitHub and on the website."""
    title = title.replace("**", "<b>", 1).replace("**", "</b>", 1)
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{text}\n\n</details>'


def rank_table(found: Sequence[Comparison]) -> str:
    """Mean rank over all networks and budgets, right after pruning, of contenders that took part in all."""
    found = [comparison for comparison in found if comparison.seeds(MAIN, "0")]
    names = [name for name in found[0].common("0") if all(name in one.common("0") for one in found)] if found else []
    if len(names) < 2:
        return ""
    ranks: dict[str, list[int]] = {name: [] for name in names}
    for comparison in found:
        seeds = comparison.seeds(MAIN, "0")
        accuracies = {name: comparison.accuracy(name, "0", seeds=seeds) for name in names}
        for place, name in enumerate(sorted(names, key=lambda name: -accuracies[name]), start=1):
            ranks[name].append(place)
    ordered = sorted(names, key=lambda name: statistics.mean(ranks[name]))
    rows = [
        [
            label(name),
            f"{statistics.mean(ranks[name]):.1f}",
            " ".join(map(str, ranks[name])),
        ]
        for name in ordered
    ]
    budgets = {subject: ", ".join(str(one.key) for one in group) for subject, group in by_subject(found).items()}
    where = "; ".join(f"{subject} ({text})" for subject, text in budgets.items())
    title = (
        f"**Ranks**, right after pruning, by PGD-20, of the {len(names)} with results for all of these networks and "
        f"budgets: mean, and each: {where}."
    )
    return f"{title}\n\n{markdown(['', 'mean', 'each'], rows)}"


# --- plots -----------------------------------------------------------------------------------------------------------

SHOWN: dict[str, tuple[str, str]] = {
    MAIN: (BLUE, "o"),
    "MRS allocate": ("#56B4E9", "P"),
    "MRSImportance, global": (GREEN, "s"),
    "L2, uniform": (ORANGE, "^"),
    BESIDE: ("#7F3C00", "<"),
    "L2, global": ("#E69F00", "v"),
    "Taylor (adversarial), global": ("#CC79A7", "D"),
    "random, uniform": (GREY, "x"),
}
"""Contender → colour (Okabe and Ito) and marker."""


class Kind(NamedTuple):
    """How contenders of one sort are drawn."""

    text: str
    colour: str
    marker: str


KINDS: dict[str, Kind] = {
    **dict.fromkeys(OTHERS, Kind("others", GREY, "o")),
    **dict.fromkeys(COMPENSATED, Kind("criteria with our compensation", ORANGE, "^")),
    **dict.fromkeys(OURS, Kind("ours, without compensation", GREEN, "s")),
    MAIN: Kind(MAIN, BLUE, "D"),
}
"""Of those that are drawn beside all others."""

ROBUST = "PGD-20 accuracy (%)"
MANY_LAYERS = 30

MANY, ROW_HEIGHT = 40, 0.17
"""Contenders at one budget that are drawn all together, and inches that each takes."""

SIDEWAYS = -0.7
"""Percent of the MACs between contenders of the same size, so that intervals do not hide each other."""


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """Two beside each other, as wide as a page."""
    columns = min(count, PANELS_IN_A_ROW)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(PANEL_WIDTH * columns, 0.8 + PANEL_HEIGHT * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def strips(count: int) -> tuple[Figure, list[Axes]]:
    """One below the other, each as wide as a page."""
    size = PANEL_WIDTH * PANELS_IN_A_ROW, STRIP_HEIGHT * count
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False).flat)


def spread(comparison: Comparison, name: str, point: str, seeds: Iterable[int]) -> tuple[float, float, float]:
    """Robust accuracy in %, and its 95% interval over seeds and images."""
    return bootstrap([right(comparison.cells[name][seed], point) for seed in seeds])


def draw(axis: Axes, name: str, xs: Sequence[float], found: Sequence[tuple[float, float, float]]) -> None:
    colour, marker = SHOWN[name]
    means, lows, highs = np.array(found).T
    width = 2.4 if name == MAIN else 1.4
    bars = [np.maximum(means - lows, 0), np.maximum(highs - means, 0)]
    axis.errorbar(
        xs, means, yerr=bars, color=colour, marker=marker, label=name, linewidth=width, capsize=2, markersize=5
    )


def finish(figure: Figure, axes: Sequence[Axes], path: Path, ylabel: str) -> None:
    for axis in axes:
        axis.set_ylabel(ylabel)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = max(1, int(figure.get_figwidth() / LABEL_WIDTH))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def plot_budgets(found: Sequence[Comparison], path: Path) -> None:
    """Robust accuracy against MACs, right after pruning."""
    groups = by_subject(one for one in found if one.key.measure == "macs" and one.seeds(MAIN, "0"))
    if groups:
        figure, axes = panels(len(groups))
        for axis, (subject, group) in zip(axes, groups.items(), strict=True):
            for number, name in enumerate(SHOWN):
                there = [one for one in group if name in one.common("0")]
                if there:
                    shift = SIDEWAYS * (number - (len(SHOWN) - 1) / 2)
                    sizes = [one.size(name, "macs") + shift for one in there]
                    draw(axis, name, sizes, [spread(one, name, "0", one.seeds(MAIN, "0")) for one in there])
            dense = group[0].dense_accuracy(group[0].seeds(MAIN, "0"))
            axis.axhline(dense, color="black", linestyle=":", label="dense")
            axis.set_title(subject, fontsize="medium")
            axis.set_xlabel("MACs left (%, moved apart), no fine-tuning")
            targets = [100 * one.key.target for one in group]
            axis.set_xlim(min(targets) - 10, max(targets) + 10)
        finish(figure, axes, path, ROBUST)


def plot_curves(found: Sequence[Comparison], path: Path) -> None:
    """Robust accuracy against epochs of fine-tuning."""
    curves = [one for one in found if recovery(one)]
    if curves:
        figure, axes = panels(len(curves))
        for axis, one in zip(axes, curves, strict=True):
            points, seeds = [point for point in one.points() if one.seeds(MAIN, point)], one.whole_curve()
            for name in SHOWN:
                if set(seeds) <= set(one.whole_curve(name)):
                    found_at = [spread(one, name, point, seeds) for point in points]
                    draw(axis, name, [float(point) for point in points], found_at)
            axis.axhline(one.dense_accuracy(seeds), color="black", linestyle=":", label="dense")
            axis.set_xscale("symlog", linthresh=0.1)
            ticks = [float(point) for point in points]
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_xlim(-0.02, 1.1 * max(ticks))
            axis.set_title(f"{one.key.subject},\n{one.key}", fontsize="medium")
            axis.set_xlabel("epochs of fine-tuning")
        finish(figure, axes, path, ROBUST)


def plot_widths(found: Sequence[Comparison], path: Path) -> None:
    """Channels that each layer keeps, of the first seed, at the smallest budget of MACs of each network."""
    groups = by_subject(one for one in found if one.key.measure == "macs" and one.seeds(MAIN, "0"))
    smallest = [min(group, key=lambda one: one.key.target) for group in groups.values()]
    if smallest:
        figure, axes = strips(len(smallest))
        for axis, one in zip(axes, smallest, strict=True):
            layers = channels_kept(one, one.seeds(MAIN, "0")[0])
            for name, (colour, marker) in SHOWN.items():
                points = [(at, widths[name]) for at, widths in enumerate(layers.values()) if name in widths]
                if points:
                    size, width = (6, 1.8) if name == MAIN else (4, 0.6)
                    xs, ys = zip(*points, strict=True)
                    axis.plot(xs, ys, color=colour, marker=marker, label=name, markersize=size, linewidth=width)
            axis.set_title(f"{one.key.subject}, {one.key}", fontsize="medium")
            fontsize = "small" if len(layers) <= MANY_LAYERS else "xx-small"
            axis.set_xticks(range(len(layers)), list(layers), fontsize=fontsize, rotation=90)
            axis.set_xlim(-0.5, len(layers) - 0.5)
            axis.set_ylim(0, 103)
        finish(figure, axes, path, "output channels kept (%)")


def of_many(comparison: Comparison) -> Comparison:
    """The same of the seeds that many contenders were run on."""
    seeds = comparison.seeds(MAIN, "0")
    return comparison.only(seed for seed in seeds if len(comparison.only([seed]).common("0")) >= MANY)


def plot_everyone(found: Sequence[Comparison], path: Path) -> None:
    """Robust accuracy right after pruning of all contenders, in order, on seeds that many of them have."""
    crowds = [crowd for crowd in map(of_many, found) if crowd.cells]
    if crowds:
        names = [[name for name in one.common("0") if name in KINDS] for one in crowds]
        size = PANEL_WIDTH * PANELS_IN_A_ROW, 1.2 + ROW_HEIGHT * max(map(len, names))
        figure = Figure(figsize=size, layout="constrained")
        axes = list(figure.subplots(1, len(crowds), squeeze=False).flat)
        for axis, one, those in zip(axes, crowds, names, strict=True):
            seeds = one.seeds(MAIN, "0")
            those = sorted(those, key=lambda name: one.accuracy(name, "0", seeds=seeds))
            for row, name in enumerate(those):
                kind, (mean, low, high) = KINDS[name], spread(one, name, "0", seeds)
                bar = [[max(mean - low, 0)], [max(high - mean, 0)]]
                axis.errorbar(mean, row, xerr=bar, color=kind.colour, marker=kind.marker, label=kind.text, markersize=4)
            axis.axvline(one.dense_accuracy(seeds), color="black", linestyle=":", label="dense")
            axis.set_yticks(range(len(those)), those, fontsize="x-small")
            axis.set_ylim(-1, len(those))
            axis.set_title(f"{one.key.subject},\n{one.key}, {seeds_text(seeds)}", fontsize="medium")
            axis.set_xlabel(ROBUST)
        finish(figure, axes, path, "")


def channels_kept(comparison: Comparison, seed: int) -> dict[str, dict[str, float]]:
    """Of each layer that any of the contenders shown prunes, what each of them keeps, in %; each shape once."""
    shapes: dict[str, dict[str, int]] = {}
    for name in SHOWN:
        shape = comparison.cells.get(name, {}).get(seed, {}).get("widths")
        if shape is not None and shape not in shapes.values():
            shapes[name] = shape
    found: dict[str, dict[str, float]] = {}
    for layer, width in comparison.dense[seed]["widths"].items():
        kept = {name: 100 * shape[layer] / width for name, shape in shapes.items()}
        if min(kept.values()) < 100:
            found[layer] = kept
    return found


PLOTS: dict[str, Callable[[Sequence[Comparison], Path], None]] = {
    "pruners-all.png": plot_everyone,
    "pruners-budgets.png": plot_budgets,
    "pruners-curves.png": plot_curves,
    "pruners-widths.png": plot_widths,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=CELLS, help="folder of the cells (default: the committed ones)")
    parser.add_argument("--out", type=Path, help="folder for report.md and plots, instead of the README files")
    arguments = parser.parse_args()
    try:
        if arguments.out:
            check_output_folder(arguments.out)
        elif arguments.cells.resolve() != CELLS.resolve():
            raise InputError("out: needed for cells of your own; without it the committed tables are replaced")
        found = comparisons(arguments.cells)
    except InputError as error:
        parser.error(str(error))
    if arguments.out:
        write_bytes(arguments.out / "report.md", f"{tables(found)}\n".encode())
    else:
        fill("pruners", tables(found))
        fill("pruners_summary", summary(found, details=False), FOLDER.parent / "README.md")
    for name, plot in PLOTS.items():
        plot(found, (arguments.out or RESULTS) / name)
    print(f"written to {arguments.out or 'README.md, benchmarks/README.md and benchmarks/results'}")


if __name__ == "__main__":
    main()
