"""The command line: `tp-mrs prune | sensitivity | evaluate | export`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .allocation import single_budget
from .arguments import fill_in, parser
from .display import messages, print_evaluations, print_report, save_figure
from .errors import DivergenceError, InputError, check_choice, check_count
from .evaluation import evaluate
from .exporting import check_format, export
from .files import check_output_folder
from .importance import BASES
from .jobs import Job
from .measuring import measure_sensitivity
from .pipeline import check_options, mrpf
from .storage import load, save


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 if training diverged, 2 for unusable input."""
    arguments = parser().parse_args(argv)
    with messages(quiet=arguments.quiet):
        try:
            if "data" in arguments:
                fill_in(arguments)
            COMMANDS[arguments.command](arguments)
        except InputError as error:
            print(f"tp-mrs: {error}", file=sys.stderr)
            return 2
        except DivergenceError as error:
            print(f"tp-mrs: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("tp-mrs: stopped", file=sys.stderr)
            return 130
    return 0


def _prune(arguments: argparse.Namespace) -> None:
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
    job = Job(arguments)
    out = check_output_folder(arguments.out)
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
        **job.training(),
    )
    save(model, out / "model.safetensors", class_names=job.data.class_names)
    report.save(out / "report.json")
    save_figure(report.plot(), out / "sensitivity")
    if arguments.json:
        print(json.dumps(report.to_dict()))
        return
    print_report(report, f"{job.data.name}, eps {arguments.eps}")
    print(f"\nWritten to {out}: model.safetensors, report.json, sensitivity.png, sensitivity.svg")
    print(f"Load it with tp_mrs.load({str(out / 'model.safetensors')!r})")


def _sensitivity(arguments: argparse.Namespace) -> None:
    job = Job(arguments)
    out = check_output_folder(arguments.out) if arguments.out else None
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
    if out is not None:
        sensitivity.save(out / "sensitivity.json")
        save_figure(sensitivity.plot(), out / "sensitivity")
    print(json.dumps(sensitivity.to_dict()) if arguments.json else sensitivity)


def _evaluate(arguments: argparse.Namespace) -> None:
    job = Job(arguments)
    result = evaluate(
        job.model(),
        job.test_loader(),
        arguments.attacks,
        eps=job.eps,
        masking=arguments.masking,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    if arguments.json:
        print(json.dumps(result.to_dict()))
    else:
        print_evaluations({"model": result}, f"{job.data.name}, eps {arguments.eps}")


def _export(arguments: argparse.Namespace) -> None:
    if arguments.image_size is not None:
        check_count("image_size", arguments.image_size)
    source = Path(arguments.checkpoint)
    suffix = ".pt2" if arguments.format == "pt2" else ".onnx"
    target = Path(arguments.out) if arguments.out else source.with_suffix(suffix)
    check_format(target, arguments.format, arguments.opset)
    if target.resolve() == source.resolve():
        raise InputError(f"out: {target} is the model itself; choose another name")
    model = load(source)
    images = _images_for(model, arguments.image_size)
    check_output_folder(target.parent)
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


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "prune": _prune,
    "sensitivity": _sensitivity,
    "evaluate": _evaluate,
    "export": _export,
}


if __name__ == "__main__":
    sys.exit(main())
