"""What can be done with each family of timm: a table of its smallest members.

    python -m benchmarks.timm_coverage                 # all families that have no result yet; takes about an hour
    python -m benchmarks.timm_coverage --only resnet   # one of them, anew
    python -m benchmarks.timm_coverage --report        # the table from the results

A family is a module of timm's that registers models. Its member here is the one with the fewest parameters that takes
images of at most 224 pixels; timm's `test_*` models, which nobody uses, don't count. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn
from tqdm.auto import tqdm

import tp_mrs
from benchmarks.tables import RESULTS, fill, provenance
from tp_mrs.counting import count
from tp_mrs.files import read_json, write_json
from tp_mrs.pruning import PRUNING_ERRORS, build_pruner

RESULT = RESULTS / "timm_coverage.json"
README = Path(__file__).parents[1] / "README.md"
FORMAT = "tp_mrs.timm_coverage/1"
LARGEST_IMAGE, CLASSES, RATIO, TIMEOUT = 224, 10, 0.5, 1_800
STEPS = ("proven", "prunes", "trains", "saved", "exported")
FAILURES = (*PRUNING_ERRORS, tp_mrs.InputError, NotImplementedError)


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.family:
        print(json.dumps(examine(*arguments.family)))
        return
    if not arguments.report:
        run(arguments.only, arguments.jobs)
    fill("timm_coverage", f"{summary()}\n\n{table()}")
    fill("timm_summary", f"{summary()} The table is in [benchmarks](benchmarks/README.md#families-of-timm).", README)


def run(only: list[str] | None, jobs: int) -> None:
    """Examine the families that have no result, or the given ones, each in its own process, so many at a time."""
    result: dict[str, Any] = {"format": FORMAT, "members": {}, "families": {}}
    if RESULT.exists():
        result = read_json(RESULT, FORMAT)
    result.update({"settings": {"largest_image": LARGEST_IMAGE, "pruning_ratio": RATIO}, **provenance()})
    if not result["members"]:
        result["members"] = members()
        write_json(RESULT, result)
    names = only or [name for name in result["members"] if name not in result["families"]]
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(_in_process, result["members"][name]): name for name in names}
        for done in tqdm(as_completed(waiting), "families", total=len(names)):
            result["families"][waiting[done]] = done.result()
            write_json(RESULT, result)


def members() -> dict[str, list[str]]:
    """Family → its members that may take small images, the one with fewest parameters first; five at most."""
    found = {}
    for family in tqdm(timm.list_modules(), "counting parameters"):
        sizes = {}
        for name in timm.list_models(module=family):
            if not name.startswith("test_"):
                with torch.device("meta"):
                    sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        if sizes:
            found[family] = sorted(sizes, key=lambda name: sizes[name])[:5]
    return found


def _in_process(candidates: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.timm_coverage", "--family", *candidates]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"member": candidates[0], "reason": f"took more than {TIMEOUT} s"}
    if done.returncode:
        return {"member": candidates[0], "reason": f"stopped: {(done.stderr.strip().splitlines() or ['killed'])[-1]}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def examine(*candidates: str) -> dict[str, Any]:
    """Try everything with the first of the members that takes small images."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    for name in candidates:
        for size, fixed in ((128, False), (LARGEST_IMAGE, False), (LARGEST_IMAGE, True)):
            arguments: dict[str, Any] = {"img_size": size} if fixed else {}
            try:
                model = tp_mrs.create_model(name, num_classes=CLASSES, image_size=size, **arguments).eval()
                images = torch.rand(1, 3, size, size)
                with torch.no_grad():
                    model(images)
            except FAILURES:
                continue
            return {"member": name, "image_size": size, **_Case(model, images).run()}
    return {"member": candidates[0], "reason": f"takes no images of {LARGEST_IMAGE} pixels or less"}


class _Case:
    """One model on its way through all steps; each raises if it fails, and adds to the row what it has measured."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images
        self.row: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Take the steps in turn; without a pruned model there is nothing to train, save or export."""
        for step in STEPS:
            if step in STEPS[2:] and not self.row["prunes"]:
                self.row[step] = False
                continue
            try:
                getattr(self, step)()
                self.row[step] = True
            except FAILURES as error:
                self.row[step] = False
                lines = re.sub(r"/\S+/", "", str(error).strip()).splitlines()  # without folders of this machine
                self.row.setdefault("reason", f"{step}: {lines[0] if lines else type(error).__name__}"[:300])
        return self.row

    def proven(self) -> None:
        start = time.perf_counter()
        build_pruner(self.model, self.images)
        self.row["build_seconds"] = round(time.perf_counter() - start, 2)
        report = tp_mrs.check_coupling(self.model, self.images)
        self.row["groups"] = len(report.checks)
        if not report.proven:
            raise ValueError("; ".join(f"{check.group}: {check.fault}" for check in report.faults[:2]) or "no groups")

    def prunes(self) -> None:
        dense = count(self.model, self.images)
        pruner = tp.pruner.BasePruner(
            self.model,
            self.images,
            importance=tp.importance.MagnitudeImportance(),
            pruning_ratio=RATIO,
            **tp_mrs.pruner_kwargs(self.model),
        )
        pruner.step()
        tp_mrs.refresh(self.model)
        pruned = count(self.model, self.images)
        self.row["macs"] = round(pruned.macs / dense.macs, 3)
        self.row["params"] = round(pruned.params / dense.params, 3)
        if min(self.row["macs"], self.row["params"]) > 0.95:
            raise ValueError(f"{self.row['macs']:.0%} of the MACs are left")

    def trains(self) -> None:
        self.model.train()
        self.model(torch.rand(2, *self.images.shape[1:])).sum().backward()
        self.model.eval()
        if all(parameter.grad is None for parameter in self.model.parameters()):
            raise ValueError("no gradients")

    def saved(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            again = tp_mrs.load(tp_mrs.save(self.model, Path(folder) / "model.safetensors"))
        with torch.no_grad():
            if not torch.equal(self.model(self.images), again(self.images)):
                raise ValueError("other outputs after loading")

    def exported(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            tp_mrs.export(self.model, Path(folder) / "model.pt2", self.images)


def summary() -> str:
    """How many families work fully."""
    result = read_json(RESULT, FORMAT)
    families = result["families"].values()
    full = sum(all(row.get(step) for step in STEPS) for row in families)
    return (
        f"Of timm's {len(result['members'])} families of models, {len(families)} have been tried; {full} of these "
        f"({full / len(families):.0%}) were pruned by {RATIO:.0%}, with all couplings proven, trained, saved, loaded "
        f"and exported (the smallest member of each, at most {LARGEST_IMAGE} px; timm {result['versions']['timm']}, "
        f"Torch-Pruning {result['versions']['torch-pruning']})."
    )


def table() -> str:
    """The results as Markdown; MACs and parameters are what is left."""
    families = read_json(RESULT, FORMAT)["families"]
    lines = [
        "| family | member | px | groups | MACs | params | " + " | ".join(STEPS) + " | reason |",
        "| --- | --- | ---: | ---: | ---: | ---: |" + " :-: |" * len(STEPS) + " --- |",
    ]
    for name, row in sorted(families.items()):
        marks = " | ".join("yes" if row.get(step) else "no" for step in STEPS)
        shares = " | ".join(f"{row[key]:.0%}" if key in row else "" for key in ("macs", "params"))
        numbers = f"{row.get('image_size', '')} | {row.get('groups', '')} | {shares}"
        reason = row.get("reason", "").replace("|", "/")
        lines.append(f"| {name} | {row['member']} | {numbers} | {marks} | {reason} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="examine these anew")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    parser.add_argument("--report", action="store_true", help="write the table from the results there are")
    parser.add_argument("--family", nargs="+", help=argparse.SUPPRESS)  # what a process of its own is given
    return parser


if __name__ == "__main__":
    main()
