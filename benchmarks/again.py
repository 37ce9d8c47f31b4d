"""Make cells anew, to see whether the same comes out: `python -m benchmarks.again --out DIR`.

Each point of each cell of benchmarks/results/cells/, or of those chosen, is pruned, fine-tuned and evaluated again as
its cell says. What is in DIR already is not done again. It prints on how many test images the outcome is another: on
the same machine and versions it should be none. `python -m benchmarks.report --cells DIR --out DIR` makes the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, Budget
from benchmarks.report import ATTACK, MEASURES, read_cell, right
from benchmarks.run import CELLS, at_hand, check_each, do, in_processes, path_of
from benchmarks.tiers import SECOND, Work
from tp_mrs.errors import InputError, check_choice, check_count, check_seed
from tp_mrs.files import check_output_folder


def again(path: Path, folder: Path, data_dir: str | None) -> None:
    """Make one cell anew in the folder, and print how it compares.

    Raises:
        InputError: its data are not at hand, its dense network cannot be made again, or there is no such contender.
    """
    cell = read_cell(path)
    work = Work(cell["data"], cell["network"], Budget(*cell["budget"]), cell["seed"])
    name = cell["contender"]
    check_choice("contender", name, CONTENDERS)
    for measure in MEASURES:
        points = cell.get(measure, {})
        if points:
            do(
                work,
                sorted(map(float, points)),
                {name: CONTENDERS[name]},
                folder,
                data_dir,
                test_images=cell["settings"]["test_images"],
                attacks=[attack for attack in next(iter(cell["curve"].values()))["outcomes"] if attack != "clean"],
                second={measure: max(found["images"] for found in points.values())} if measure in SECOND else None,
            )
    made = read_cell(path_of(folder, work, name))
    if made["settings"]["dense"] != cell["settings"]["dense"]:
        print(f"{path}: from another dense network, of another kind of machine or other versions", flush=True)
    for measure in MEASURES:
        attack = SECOND.get(measure, (ATTACK,))[-1]
        for point in cell.get(measure, {}):
            where = f"{work.data}/{work.network} {work.budget.text} seed {work.seed}  {name}, {measure} {point}"
            print(f"{where}: {compared(cell, made, measure, point, attack)}", flush=True)


def _again_in_turn(paths: Sequence[Path], folder: Path, data_dir: str | None) -> None:
    """Cells of one network and seed, in one process, which trains the dense one if it is not there."""
    for path in paths:
        again(path, folder, data_dir)


def compared(before: dict[str, Any], after: dict[str, Any], measure: str, point: str, attack: str) -> str:
    """One point, in words."""
    if point not in after.get(measure, {}):
        return f"not made ({after.get('failed')})"
    old, new = (right(cell, point, attack, measure) for cell in (before, after))
    return f"{attack} {100 * new.mean():.1f}, was {100 * old.mean():.1f}; {int((new != old).sum())} images differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the new cells")
    parser.add_argument("--cells", type=Path, default=CELLS, help="the old ones (default: those committed)")
    parser.add_argument("--data-dir", help="folder with the data sets; without it, digits only")
    parser.add_argument("--jobs", type=int, default=1, help="processes, which share the cores")
    parser.add_argument("--networks", nargs="+", metavar="DATA/NAME", help="only these")
    parser.add_argument("--budgets", nargs="+", metavar="macs-50", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only these")
    arguments = parser.parse_args()
    try:
        check_count("jobs", arguments.jobs)
        for seed in arguments.seeds or ():
            check_seed(seed)
        check_each("contenders", arguments.contenders or (), CONTENDERS)
        folder = check_output_folder(arguments.out)
        if folder.resolve() == arguments.cells.resolve():
            raise InputError("out: it is the folder of the old cells, which are not made again; choose another one")
        cells = {path: read_cell(path) for path in sorted(arguments.cells.glob("*/*/*.json"))}
        cells = {path: cell for path, cell in cells.items() if chosen(cell, arguments)}
        if not cells:
            raise InputError(f"cells: {arguments.cells} is no folder of cells, or has none of these")
        there = at_hand({cell["data"] for cell in cells.values()}, arguments.data_dir)
    except InputError as error:
        parser.error(str(error))
    by_network: dict[tuple[Any, ...], list[Path]] = {}
    for path, cell in cells.items():
        if cell["data"] in there:
            by_network.setdefault((cell["data"], cell["network"], cell["seed"]), []).append(path)
    tasks = [partial(_again_in_turn, paths, folder, arguments.data_dir) for paths in by_network.values()]
    sys.exit(0 if in_processes(tasks, arguments.jobs) else 1)


def chosen(cell: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Whether it is one of those that were asked for, and met its budget."""
    found = {
        "networks": f"{cell['data']}/{cell['network']}",
        "budgets": Budget(*cell["budget"]).text,
        "seeds": cell["seed"],
        "contenders": cell["contender"],
    }
    return "curve" in cell and all(value in (getattr(arguments, name) or [value]) for name, value in found.items())


if __name__ == "__main__":
    main()
