"""The pictures in the gallery: `python -m docs.gallery` runs a small job on digits and draws them anew.

The same versions give the same bytes.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
import torch_pruning as tp
from matplotlib.figure import Figure
from torch import nn

from tp_mrs import Evaluation, Sensitivity, allocate, evaluate, finetune, recalibrate
from tp_mrs.cli import main
from tp_mrs.cli.arguments import parse
from tp_mrs.cli.jobs import Job
from tp_mrs.data import hold_out, make_loader
from tp_mrs.files import check_output_folder, read_json, write_bytes
from tp_mrs.pipeline import FORMAT
from tp_mrs.plotting import plot_tradeoff, plot_training, to_image
from tp_mrs.pruning import prune_by_ratio

GALLERY = Path(__file__).with_name("images") / "gallery"

JOB = """prune --model resnet10t --model-kwargs channels=8,16,32,64 stem_width=8 --dense-epochs 8 --epochs 4
    --attacks pgd-10 --more-eps 0.05 0.15 0.2 --device cpu --quiet --out runs/gallery"""
BUDGETS = (0.2, 0.4, 0.6, 0.8)
ALPHAS = {"ratios by sensitivity": 0.5, "one ratio for all": 0.0}
OBJECTIVES = {"fgsm": "ffgsm", "trades": "tpgd-3"}
EPOCHS, HELD_OUT = 6, 250


def draw(folder: Path) -> None:
    """Run the job, and write all pictures to the folder."""
    torch.set_num_threads(1)  # sums in another order would have other last digits
    check_output_folder(folder)
    if main(JOB.split()):
        raise SystemExit(1)
    job = Job(parse(JOB.split()), torch.device("cpu"))
    out = Path(job.arguments.out)
    for name in ("sensitivity", "widths", "robustness"):
        shutil.copy(out / f"{name}.svg", folder)
    page = (out / "report.html").read_text(encoding="utf-8")
    without_times = re.sub(r'<tr><th scope="row">ms, .*\n', "", page)  # they are others every time
    write_bytes(folder / "report.html", without_times.encode())
    report = read_json(out / "report.json", FORMAT)
    sensitivity = Sensitivity.from_dict(report["rounds"][0]["sensitivity"])
    for name, figure in {"tradeoff": tradeoff(job, sensitivity), "training": training(job, sensitivity)}.items():
        write_bytes(folder / f"{name}.svg", to_image(figure, "svg"))


def tradeoff(job: Job, sensitivity: Sensitivity) -> Figure:
    """The dense model, and pruned to several budgets in two ways, without fine-tuning."""
    dense = assessed(job, job.model())
    curves = {
        name: [dense, *(assessed(job, pruned(job, sensitivity, macs, alpha)) for macs in BUDGETS)]
        for name, alpha in ALPHAS.items()
    }
    return plot_tradeoff(curves)


def training(job: Job, sensitivity: Sensitivity) -> Figure:
    """The model pruned to the smallest budget, fine-tuned by several objectives."""
    data, held_out = hold_out(job.data, HELD_OUT)
    runs = {}
    for objective, attack in OBJECTIVES.items():
        runs[objective] = finetune(
            pruned(job, sensitivity, BUDGETS[0], alpha=0.5),
            make_loader(data.train, batch_size=job.arguments.batch_size, shuffle=True),
            attack=attack,
            eps=job.eps,
            epochs=EPOCHS,
            validation_data=make_loader(held_out, batch_size=HELD_OUT),
            progress=False,
            **{**job.training(), "objective": objective},
        ).history
    return plot_training(runs)


def pruned(job: Job, sensitivity: Sensitivity, macs: float, alpha: float) -> nn.Module:
    """The dense model, read anew and pruned, with BatchNorm's statistics set anew."""
    model = job.model()
    ratios = allocate(model, job.example_inputs, sensitivity, macs=macs, alpha=alpha)
    prune_by_ratio(model, job.example_inputs, ratios, tp.importance.MagnitudeImportance())
    return recalibrate(model, job.calibration_loader(), progress=False)


def assessed(job: Job, model: nn.Module) -> Evaluation:
    return evaluate(model, job.test_loader(), job.arguments.attacks, eps=job.eps, latency=False, progress=False)


if __name__ == "__main__":
    draw(GALLERY)
