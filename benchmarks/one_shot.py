"""Robust accuracy right after pruning, without fine-tuning, at equal measured MACs: MRS against Torch-Pruning's own.

    python -m benchmarks.one_shot --data digits --seeds 0 1 2
    python -m benchmarks.one_shot --data cifar10 --data-dir DIR --seeds 0
    python -m benchmarks.one_shot --report

For each seed it trains a dense model adversarially (kept in the cache of tp_mrs), prunes copies of it by each criterion
to the same multiply-accumulates, and evaluates all of them on the same test images, before and after recalibrating
BatchNorm on the same calibration images. Each seed becomes a file in benchmarks/results/; seeds whose file is there are
skipped. `--report` writes the tables of the README files from them.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.networks import BATCH_SIZE, EPS, NETWORKS, TRAINING
from benchmarks.networks import dense as dense_network
from benchmarks.tables import FOLDER, RESULTS, fill, provenance
from tp_mrs import MRSImportance, allocate, evaluate, recalibrate
from tp_mrs.allocation import amount
from tp_mrs.attacks import AttackFactory, named_attack, parse_eps
from tp_mrs.data import ImageData, load_data, make_loader, random_subset
from tp_mrs.files import read_json, write_json
from tp_mrs.measuring import Measurement, measure
from tp_mrs.pruning import build_pruner, prune_by_ratio, refresh

FORMAT = "tp_mrs.one_shot/1"
ATTACK = "pgd-10"
CALIBRATION_IMAGES = 512

ARCHITECTURE, TEST_IMAGES = "resnet18", {"digits": 300, "cifar10": 500}
MACS = {"digits": [0.25], "cifar10": [0.6]}


@dataclass(frozen=True)
class Case:
    """What every criterion gets to see."""

    example: Tensor
    calibration: list[tuple[Tensor, Tensor]]
    attack: AttackFactory
    measurement: Measurement
    macs: float
    seed: int


class MeasuredBefore(MRSImportance):
    """MRSImportance on a copy of a model that is measured already: looking for a ratio takes many copies."""

    shared: Measurement

    def measurement(self) -> Measurement:
        return self.shared


Criterion = Callable[[nn.Module, Case], nn.Module]
"""Returns a copy of the model, pruned to the case's fraction of its MACs."""

Make = Callable[[nn.Module, Case], Any]
"""Makes an importance for the model."""


def by_ratio(make: Make, *, global_pruning: bool) -> Criterion:
    """Torch-Pruning's own way: one pruning ratio for the network, here the one that leaves the MACs asked for."""

    def prune(model: nn.Module, case: Case) -> nn.Module:
        dense = amount(model, case.example, "macs")

        def at(ratio: float) -> nn.Module:
            torch.manual_seed(case.seed)
            pruned = copy.deepcopy(model)
            importance = make(pruned, case)
            pruner = build_pruner(pruned, case.example, importance, pruning_ratio=ratio, global_pruning=global_pruning)
            pruner.step()
            return refresh(pruned)

        low, high, best = 0.0, 1.0, (math.inf, 0.0)
        for _ in range(10):
            middle = (low + high) / 2
            found = amount(at(middle), case.example, "macs") / dense
            best = min(best, (abs(found - case.macs), middle))
            low, high = (middle, high) if found > case.macs else (low, middle)
        return at(best[1])

    return prune


def allocated(base: Any, alpha: float = 1.0) -> Criterion:
    """Ours: ratios from `allocate`, channels within a group by the base importance."""

    def prune(model: nn.Module, case: Case) -> nn.Module:
        pruned = copy.deepcopy(model)
        importance = mrs(base, alpha=0.0)(pruned, case)
        ratios = allocate(pruned, case.example, importance.sensitivity(case.example), macs=case.macs, alpha=alpha)
        prune_by_ratio(pruned, case.example, ratios, importance)
        return pruned

    return prune


def mrs(base: Any, alpha: float = 1.0) -> Make:
    """MRSImportance on the case's images; at α = 0 the base alone, which then sees adversarial gradients."""

    def make(model: nn.Module, case: Case) -> MRSImportance:
        importance = MeasuredBefore(model, case.calibration, case.attack, base=base, alpha=alpha)
        importance.shared = case.measurement
        return importance

    return make


def plain(importance: Callable[[], Any]) -> Make:
    """An importance that needs no data."""
    return lambda model, case: importance()


L2, TAYLOR = tp.importance.MagnitudeImportance, tp.importance.TaylorImportance

CRITERIA: dict[str, Criterion] = {
    "random, uniform": by_ratio(plain(tp.importance.RandomImportance), global_pruning=False),
    "L2, uniform": by_ratio(plain(L2), global_pruning=False),
    "L2, global": by_ratio(plain(L2), global_pruning=True),
    "LAMP, global": by_ratio(plain(tp.importance.LAMPImportance), global_pruning=True),
    "FPGM, uniform": by_ratio(plain(tp.importance.FPGMImportance), global_pruning=False),
    "Taylor (adversarial), uniform": by_ratio(mrs("taylor", 0.0), global_pruning=False),
    "Taylor (adversarial), global": by_ratio(mrs("taylor", 0.0), global_pruning=True),
    "MRSImportance + Taylor, global": by_ratio(mrs("taylor"), global_pruning=True),
    "MRS allocate + Taylor": allocated("taylor"),
    "MRS allocate + L2": allocated("magnitude"),
}


def compare(name: str, data: ImageData, seed: int) -> dict[str, Any]:
    """Prune and evaluate one dense model by every criterion and budget."""
    eps = parse_eps(EPS[name])
    dense = dense_network(data, ARCHITECTURE, seed=seed)
    images = random_subset(data.calibration, CALIBRATION_IMAGES, seed=seed)
    calibration = list(make_loader(images, batch_size=128))
    test = list(make_loader(random_subset(data.test, TEST_IMAGES[name], seed=0), batch_size=250))
    example, rows = torch.zeros(1, *data.shape), []
    total_macs, total_params = (amount(dense, example, what) for what in ("macs", "params"))

    def row(criterion: str, macs: float, model: nn.Module, seconds: float) -> dict[str, Any]:
        model.to(memory_format=torch.channels_last)  # faster, and safe where weights get no gradients
        before = evaluate(model, test, [ATTACK], eps=eps, latency=False)
        after = evaluate(recalibrate(model, calibration), test, [ATTACK], eps=eps, latency=False)
        print(f"{name} seed {seed}  {macs:.0%}  {criterion:32} {before.robust} {after}  {seconds:.1f} s", flush=True)
        return {
            "criterion": criterion,
            "target": macs,
            "macs": after.macs / total_macs,
            "params": after.params / total_params,
            "clean": after.clean,
            "robust": after.robust[ATTACK],
            "clean_before_recalibration": before.clean,
            "robust_before_recalibration": before.robust[ATTACK],
            "seconds": round(seconds, 2),
        }

    rows.append(row("dense", 1.0, copy.deepcopy(dense), 0.0))
    attack = named_attack(ATTACK, eps=eps)
    start = time.perf_counter()
    measurement = measure(dense, calibration, attack, seed=seed, progress=False)
    measuring = time.perf_counter() - start
    for macs in MACS[name]:
        for criterion, prune in CRITERIA.items():
            case = Case(example, calibration, attack, measurement, macs, seed)
            start = time.perf_counter()
            pruned = prune(dense, case)
            rows.append(row(criterion, macs, pruned, time.perf_counter() - start))
    return {
        "format": FORMAT,
        "data": name,
        "seed": seed,
        "settings": {
            "architecture": ARCHITECTURE,
            **NETWORKS[name, ARCHITECTURE],
            "training": TRAINING[name],
            "batch_size": BATCH_SIZE[name],
            "eps": EPS[name],
            "test_images": TEST_IMAGES[name],
            "attack": ATTACK,
            "calibration_images": CALIBRATION_IMAGES,
        },
        **provenance(),
        "measuring_seconds": round(measuring, 2),
        "rows": rows,
    }


# --- the report --------------------------------------------------------------------------------------------------


def tables() -> str:
    """Markdown tables of the committed results: means over seeds."""
    parts = []
    for name, budgets in MACS.items():
        runs = [read_json(path, FORMAT) for path in sorted(RESULTS.glob(f"one_shot-{name}-*.json"))]
        for macs in budgets if runs else []:
            parts.append(table(name, macs, runs))
    return "\n\n".join(parts)


def table(name: str, macs: float, runs: list[dict[str, Any]]) -> str:
    settings = runs[0]["settings"]
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    lines = [
        f"**{name}**, {settings['architecture']} (widths {settings['arguments']['channels']}), pruned to {macs:.0%} of "
        f"the MACs, BatchNorm recalibrated, no fine-tuning; {settings['test_images']} test images, "
        f"eps {settings['eps']}, {seeds}",
        "",
        "| criterion | MACs | params | clean | PGD-10 | PGD-10, BatchNorm as it was |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for criterion in ("dense", *CRITERIA):
        rows = [row for run in runs for row in run["rows"] if row["criterion"] == criterion]
        rows = [row for row in rows if criterion == "dense" or row["target"] == macs]
        if rows:
            columns = ("macs", "params", "clean", "robust", "robust_before_recalibration")
            values = (f"{100 * mean(row[column] for row in rows):.1f}" for column in columns)
            label = f"**{criterion}**" if "MRS" in criterion else criterion
            lines.append(f"| {label} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=MACS, default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--report", action="store_true", help="write the tables only")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if not arguments.report:
        data = load_data(arguments.data, arguments.data_dir)
        for seed in arguments.seeds:
            path = RESULTS / f"one_shot-{arguments.data}-{seed}.json"
            if not path.exists():
                write_json(path, compare(arguments.data, data, seed))
    fill("one_shot", tables(), FOLDER / "README.md", FOLDER.parent / "README.md")


if __name__ == "__main__":
    main()
