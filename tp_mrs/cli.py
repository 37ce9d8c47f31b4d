"""The command line: `tp-mrs prune | finetune | sensitivity | evaluate | export`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ._version import versions
from .allocation import single_budget
from .arguments import fill_in, parser
from .display import messages, print_change, print_evaluations, print_report, save_figure
from .errors import DivergenceError, InputError, check_choice, check_count, naming
from .evaluation import Evaluation, evaluate
from .exporting import check_format, export
from .files import check_output_folder, write_json
from .finetuning import check_training, finetune
from .importance import BASES
from .jobs import Job
from .launch import another_failed, first_to_fail, joined, one_voice
from .measuring import measure_sensitivity
from .pipeline import check_options, mrpf
from .processes import place
from .storage import load, save

PRUNED = ("model.safetensors", "report.json", "sensitivity.png", "sensitivity.svg")
FINETUNED = ("model.safetensors", "finetuning.json", "log.jsonl")
MEASURED = ("sensitivity.json", "sensitivity.png", "sensitivity.svg")
"""The files that the commands write."""

Run: TypeAlias = Callable[[argparse.Namespace, torch.device], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 if training diverged, 2 for unusable input.

    Under `torchrun` the processes share the work, the first one prints and writes, and the first that fails says why.
    """
    try:
        with one_voice():
            _run(argv)
    except InputError as error:
        return _fail(2, error)
    except DivergenceError as error:
        return _fail(1, error)
    except KeyboardInterrupt:
        return _fail(130, "stopped")
    except RuntimeError:
        if not another_failed():
            raise
        return 1
    return 0


def _fail(status: int, why: object) -> int:
    if first_to_fail():
        print(f"tp-mrs: {why}", file=sys.stderr, flush=True)
    return status


def _run(argv: Sequence[str] | None) -> None:
    arguments = parser().parse_args(argv)
    with messages(quiet=arguments.quiet):
        if "data" in arguments:
            fill_in(arguments)
        with joined(getattr(arguments, "device", "cpu")) as device:
            COMMANDS[arguments.command](arguments, device)


def _prune(arguments: argparse.Namespace, device: torch.device) -> None:
    if arguments.macs is None and arguments.params is None and arguments.channels is None:
        arguments.macs = 0.5
    single_budget(macs=arguments.macs, params=arguments.params, channels=arguments.channels)
    check_choice("base", arguments.base, BASES)
    check_options(
        rounds=arguments.rounds,
        epochs=arguments.epochs,
        alpha=arguments.alpha,
        min_keep=arguments.min_keep,
        round_to=arguments.round_to,
    )
    job = Job(arguments, device)
    out = job.output_folder(*PRUNED)
    model = job.model()
    report = mrpf(
        model,
        job.example_inputs,
        job.train_loader(),
        job.attack,
        macs=arguments.macs,
        params=arguments.params,
        channels=arguments.channels,
        rounds=arguments.rounds,
        alpha=arguments.alpha,
        min_keep=arguments.min_keep,
        round_to=arguments.round_to,
        base=arguments.base,
        estimator=arguments.estimator,
        calibration_data=job.calibration_loader(),
        test_data=job.test_loader(),
        attacks=arguments.attacks,
        epochs=arguments.epochs,
        eps=job.eps,
        seed=arguments.seed,
        progress=not arguments.quiet,
        train_attack=arguments.train_attack,
        checkpoint=out / "checkpoint",
        **job.training(),
    )
    if place()[0] > 0:
        return
    save(model, out / "model.safetensors", class_names=job.data.class_names)
    report.save(out / "report.json")
    save_figure(report.plot(), out / "sensitivity")
    shutil.rmtree(out / "checkpoint")
    if arguments.json:
        print(json.dumps(report.to_dict()))
        return
    print_report(report, f"{job.data.name}, eps {arguments.eps}")
    print(f"\nWritten to {out}: {', '.join(PRUNED)}")
    print(f"Load it with tp_mrs.load({str(out / 'model.safetensors')!r})")


def _sensitivity(arguments: argparse.Namespace, device: torch.device) -> None:
    job = Job(arguments, device)
    out = check_output_folder(arguments.out, files=MEASURED) if arguments.out else None
    sensitivity = measure_sensitivity(
        job.model(),
        job.calibration_loader(),
        job.attack,
        example_inputs=job.example_inputs,
        estimator=arguments.estimator,
        steps=arguments.steps,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    if out is not None and place()[0] == 0:
        sensitivity.save(out / "sensitivity.json")
        save_figure(sensitivity.plot(), out / "sensitivity")
    print(json.dumps(sensitivity.to_dict()) if arguments.json else sensitivity)


def _finetune(arguments: argparse.Namespace, device: torch.device) -> None:
    if not arguments.checkpoint:
        raise InputError(
            "checkpoint: give the model to fine-tune, --checkpoint FILE.safetensors: what tp-mrs prune has written, or "
            "with --model NAME a state dict of any timm model"
        )
    job = Job(arguments, device)
    out = job.output_folder(*FINETUNED, "training.safetensors")
    model, data, training = job.model(), job.train_loader(), job.finetuning()
    check_training(model, data, **training)
    before = _assessed(job, model)
    checkpoint = out / "training.safetensors"
    finetuning = finetune(model, data, **training, checkpoint=checkpoint, log=out / "log.jsonl")
    after = _assessed(job, model)
    if place()[0] > 0:
        return
    save(model, out / "model.safetensors", class_names=job.data.class_names)
    record = {
        "format": "tp_mrs.finetuning/1",
        "arguments": vars(arguments),
        **finetuning.to_dict(),
        "before": before.to_dict(),
        "after": after.to_dict(),
        "versions": versions(),
    }
    write_json(out / "finetuning.json", record)
    checkpoint.unlink()
    if arguments.json:
        print(json.dumps(record))
        return
    print_evaluations({"before": before, "after": after}, f"{job.data.name}, eps {arguments.eps}")
    print_change(before, after)
    print(f"\nWritten to {out}: {', '.join(FINETUNED)}")
    print(f"Load it with tp_mrs.load({str(out / 'model.safetensors')!r})")


def _evaluate(arguments: argparse.Namespace, device: torch.device) -> None:
    job = Job(arguments, device)
    result = _assessed(job, job.model(), masking=arguments.masking)
    if arguments.json:
        print(json.dumps(result.to_dict()))
    else:
        print_evaluations({"model": result}, f"{job.data.name}, eps {arguments.eps}")


def _assessed(job: Job, model: nn.Module, *, masking: bool = False) -> Evaluation:
    return evaluate(
        model,
        job.test_loader(),
        job.arguments.attacks,
        eps=job.eps,
        masking=masking,
        seed=job.arguments.seed,
        progress=not job.arguments.quiet,
    )


def _export(arguments: argparse.Namespace, device: torch.device) -> None:
    if arguments.image_size is not None:
        check_count("image_size", arguments.image_size)
    source = Path(arguments.checkpoint)
    suffix = ".pt2" if arguments.format == "pt2" else ".onnx"
    target = Path(arguments.out) if arguments.out else source.with_suffix(suffix)
    with naming("out", "path"):
        check_format(target, arguments.format, arguments.opset)
    if target.resolve() == source.resolve():
        raise InputError(f"out: {target} is the model itself; choose another name")
    with naming("model", "path"):
        model = load(source)
    images = _images_for(model, arguments.image_size)
    check_output_folder(target.parent, files=[target.name])
    export(model, target, images, format=arguments.format, opset=arguments.opset)
    if not arguments.quiet:
        print(f"Written to {target}: takes images ({', '.join(map(str, ('N', *images.shape[1:])))}) in [0, 1]")


def _images_for(model: nn.Module, image_size: int | None) -> Tensor:
    """One blank image of the size that the model was made for, unless another one is asked for."""
    recipe = getattr(model, "tp_mrs_recipe", {})
    size = image_size or recipe.get("image_size")
    if size is None:
        raise InputError("image_size: the file does not say what size of images its model takes; give --image-size")
    return torch.zeros(1, recipe.get("in_chans", 3), size, size)


COMMANDS: dict[str, Run] = {
    "prune": _prune,
    "finetune": _finetune,
    "sensitivity": _sensitivity,
    "evaluate": _evaluate,
    "export": _export,
}


if __name__ == "__main__":
    sys.exit(main())
