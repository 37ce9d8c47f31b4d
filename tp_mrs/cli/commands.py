"""What each command of `tp-mrs` does, and how the command line ends."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tp_mrs._version import versions
from tp_mrs.allocation import single_budget
from tp_mrs.card import FOLDER_FILES, save_folder
from tp_mrs.errors import DivergenceError, InputError, check_choice, check_count, naming
from tp_mrs.evaluation import Evaluation, evaluate
from tp_mrs.exporting import check_format, export
from tp_mrs.files import check_output_folder, write_bytes, write_json
from tp_mrs.finetuning import check_training, finetune
from tp_mrs.html import CAPTIONS, report_page
from tp_mrs.hub import WEIGHTS, on_hub, weights_file
from tp_mrs.importance import BASES
from tp_mrs.measuring import measure_sensitivity, measured_weights
from tp_mrs.pipeline import Report, check_options, mrpf
from tp_mrs.plotting import plot_robustness, plot_training, to_svg
from tp_mrs.processes import place
from tp_mrs.sensitivity import Sensitivity
from tp_mrs.stages import Stages, plainly
from tp_mrs.storage import load

from .arguments import BUDGETS, parse
from .completion import completion_script
from .config import write_config
from .display import messages, pictures, print_change, print_curves, print_evaluations, print_report, save_figure
from .doctor import examine, summary
from .jobs import Job
from .launch import another_failed, first_to_fail, joined, one_voice
from .preview import preview

PICTURES = tuple(f"{name}.{kind}" for name in CAPTIONS for kind in ("png", "svg"))
PRUNED = (*FOLDER_FILES, "report.json", "report.html", "run.yaml", *PICTURES)
FINETUNED = (*FOLDER_FILES, "finetuning.json", "log.jsonl", "run.yaml", "training.png", "training.svg")
EVALUATED = ("evaluation.json", "run.yaml", "robustness.png", "robustness.svg")
MEASURED = ("sensitivity.json", "run.yaml", "sensitivity.png", "sensitivity.svg")
"""The files that the commands write, at most."""

Result: TypeAlias = dict[str, Any]  # JSON to be
Run: TypeAlias = Callable[[argparse.Namespace, torch.device], Result]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 if training diverged, 2 for unusable input.

    Under `torchrun` the processes share the work, the first one prints and writes, and the first that fails says why.
    """
    try:
        with one_voice():
            _run(argv)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads it has enough, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        return 1
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
    arguments = parse(argv)
    run = COMMANDS[arguments.command]
    with (
        messages(quiet=getattr(arguments, "quiet", False)),
        joined(getattr(arguments, "device", "cpu")) as device,
        _no_empty_folder(getattr(arguments, "out", None)),
    ):
        if not getattr(arguments, "json", False):
            run(arguments, device)
            return
        with redirect_stdout(sys.stderr):  # whatever prints: stdout holds the result alone
            result = run(arguments, device)
        print(json.dumps(result))


def _prune(arguments: argparse.Namespace, device: torch.device) -> Result:
    if all(getattr(arguments, name) is None for name in BUDGETS):
        arguments.macs = 0.5
    single_budget(**{name: getattr(arguments, name) for name in BUDGETS})
    check_choice("base", arguments.base, BASES)
    check_options(
        rounds=arguments.rounds,
        iterative_steps=arguments.iterative_steps,
        epochs=arguments.epochs,
        alpha=arguments.alpha,
        min_keep=arguments.min_keep,
        round_to=arguments.round_to,
    )
    job = Job(arguments, device)
    if arguments.dry_run:
        return _previewed(job)
    out = job.output_folder(*PRUNED)
    model = job.model()
    dense = _at_more_sizes(job, model)
    with naming("out", "checkpoint"):
        report = mrpf(
            model,
            job.example_inputs,
            job.train_loader(),
            job.attack,
            **{name: getattr(arguments, name) for name in BUDGETS},
            rounds=arguments.rounds,
            iterative_steps=arguments.iterative_steps,
            alpha=arguments.alpha,
            min_keep=arguments.min_keep,
            round_to=arguments.round_to,
            base=arguments.base,
            compensate=arguments.compensate,
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
    if dense:
        before, *_, (name, after) = report.stages.items()
        curves = {"dense": [*dense, before[1]], name: [*_at_more_sizes(job, model), after]}
        report = replace(report, curves={name: _in_order(curve) for name, curve in curves.items()})
    if place()[0] == 0:
        report.save(out / "report.json")
        pictures = _illustrate(report, job, out)
        _save(model, report, job, out, pictures)
        write_config(out / "run.yaml", arguments)
        shutil.rmtree(out / "checkpoint")
    if not arguments.json:
        print_report(report, f"{job.data.name}, eps {arguments.eps}")
        print_curves(report.curves)
        print(f"\nWritten to {out}: report.html to look at, README.md (a model card), model.safetensors, and more")
        print(f"Load it with tp_mrs.load({str(out)!r})")
    return report.to_dict()


def _at_more_sizes(job: Job, model: nn.Module) -> list[Evaluation]:
    """Evaluations at the further sizes of perturbation that were asked for."""
    return [_assessed(job, model, eps=eps) for eps in job.more_eps]


def _in_order(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    return sorted(evaluations, key=lambda each: each.eps)


def _save(model: nn.Module, report: Report | Evaluation, job: Job, out: Path, pictures: Sequence[str] = ()) -> None:
    data, run = job.data, vars(job.arguments)
    save_folder(model, out, report, class_names=data.class_names, dataset=data.name, run=run, pictures=pictures)


def _illustrate(report: Report, job: Job, out: Path) -> Sequence[str]:
    """Write the pictures, and the page that has them all; returns the pictures' names."""
    figures = pictures(report)
    for name, figure in figures.items():
        save_figure(figure, out / name)
    page = report_page(
        report,
        model=job.arguments.checkpoint or job.arguments.model,
        data=job.data.name,
        classes=job.data.class_names or (),
        run=vars(job.arguments),
        pictures={name: to_svg(figure) for name, figure in figures.items()},
    )
    write_bytes(out / "report.html", page.encode())
    return list(figures)


@contextmanager
def _no_empty_folder(out: str | None) -> Iterator[None]:
    """If the block is refused its input before it has written anything, the folder that it made goes again."""
    was_there = out is None or Path(out).exists()
    try:
        yield
    except InputError:
        if out is not None and not was_there:
            with suppress(OSError):  # it holds something
                Path(out).rmdir()
        raise


def _previewed(job: Job) -> Result:
    """What `tp-mrs prune` would do: by the dense model's sensitivity, or the shapes of one that is not there yet."""
    arguments, dense = job.arguments, job.known_model()
    model = job.untrained() if dense is None else dense
    steps = arguments.rounds * arguments.iterative_steps
    notes = [f"By one measurement; the run takes {steps} steps, measures before each, and differs a little."] * (
        steps > 1
    )
    if dense is None:
        how = (
            f"the run trains one, {arguments.dense_epochs:g} epochs" if arguments.dense_epochs else "the run needs one"
        )
        notes.append(f"There is no dense model yet ({how}): without sensitivities, ratios are uniform here.")
    shown = preview(
        model,
        job.example_inputs,
        None if dense is None else _measured(job, dense),
        passes=job.passes(dense=dense is None, layers=len(measured_weights(model)[0])),
        train_images=len(job.train_loader().dataset),
        notes=notes,
        **{name: getattr(arguments, name) for name in (*BUDGETS, "alpha", "min_keep", "round_to")},
    )
    if not arguments.json:
        print(shown)
    return shown.to_dict()


def _sensitivity(arguments: argparse.Namespace, device: torch.device) -> Result:
    job = Job(arguments, device)
    out = job.output_folder(*MEASURED) if arguments.out else None
    sensitivity = _measured(job, job.model(), steps=arguments.steps)
    if out is not None and place()[0] == 0:
        sensitivity.save(out / "sensitivity.json")
        write_config(out / "run.yaml", arguments)
        save_figure(sensitivity.plot(), out / "sensitivity")
    if not arguments.json:
        print(sensitivity)
    return sensitivity.to_dict()


def _measured(job: Job, model: nn.Module, *, steps: int = 5) -> Sensitivity:
    return measure_sensitivity(
        model,
        job.calibration_loader(),
        job.attack,
        example_inputs=job.example_inputs,
        estimator=job.arguments.estimator,
        steps=steps,
        seed=job.arguments.seed,
        progress=not job.arguments.quiet,
    )


def _finetune(arguments: argparse.Namespace, device: torch.device) -> Result:
    if not arguments.checkpoint and not arguments.pretrained:
        raise InputError(
            "checkpoint: give the model to fine-tune, --checkpoint FILE.safetensors: what tp-mrs prune has written, or "
            "with --model NAME a state dict of any timm model; or --pretrained for timm's own weights"
        )
    job = Job(arguments, device)
    out = job.output_folder(*FINETUNED)
    model, data, training = job.model(), job.train_loader(), job.finetuning()
    check_training(model, data, **training)
    testing = plainly({"eps": job.eps, "seed": arguments.seed, "attacks": arguments.attacks, "data": job.test_loader()})
    with naming("out", "checkpoint"):
        stages = Stages(out / "checkpoint", model, testing, (), keeps=(Evaluation,))
        before = Evaluation.from_dict(stages.do("before", lambda: _assessed(job, model).to_dict()))
        finetuning = finetune(model, data, **training, checkpoint=stages.file("training"), log=out / "log.jsonl")
    after = _assessed(job, model)
    record = {
        "format": "tp_mrs.finetuning/1",
        "arguments": vars(arguments),
        **finetuning.to_dict(),
        "before": before.to_dict(),
        "after": after.to_dict(),
        "versions": versions(),
    }
    if place()[0] == 0:
        _save(model, after, job, out)
        write_json(out / "finetuning.json", record)
        save_figure(plot_training({"fine-tuning": finetuning.history}), out / "training")
        write_config(out / "run.yaml", arguments)
        shutil.rmtree(out / "checkpoint")
    if not arguments.json:
        print_evaluations({"before": before, "after": after}, f"{job.data.name}, eps {arguments.eps}")
        print_change(before, after)
        print(f"\nWritten to {out}: model.safetensors, README.md (a model card), finetuning.json, log.jsonl, and more")
        print(f"Load it with tp_mrs.load({str(out)!r})")
    return record


def _evaluate(arguments: argparse.Namespace, device: torch.device) -> Result:
    job = Job(arguments, device)
    out = job.output_folder(*EVALUATED) if arguments.out else None
    model = job.model()
    result = _assessed(job, model, masking=arguments.masking)
    curve = _in_order([*_at_more_sizes(job, model), result])
    name = Path(arguments.checkpoint or arguments.model).name
    curves = {name: curve} if job.more_eps else {}
    record = {
        "format": "tp_mrs.evaluation/1",
        **result.to_dict(),
        "curve": [each.to_dict() for each in curve],
        "versions": versions(),
    }
    if out is not None and place()[0] == 0:
        write_json(out / "evaluation.json", record)
        write_config(out / "run.yaml", arguments)
        if curves:
            save_figure(plot_robustness(curves), out / "robustness")
    if not arguments.json:
        print_evaluations({name: result}, f"{job.data.name}, eps {arguments.eps}")
        print_curves(curves)
        if out is not None:
            print(f"\nWritten to {out}: evaluation.json, run.yaml{', and a picture' * bool(curves)}")
    return record


def _assessed(job: Job, model: nn.Module, *, masking: bool = False, eps: float | None = None) -> Evaluation:
    return evaluate(
        model,
        job.test_loader(),
        job.arguments.attacks,
        eps=job.eps if eps is None else eps,
        masking=masking,
        seed=job.arguments.seed,
        progress=not job.arguments.quiet,
    )


def _export(arguments: argparse.Namespace, device: torch.device) -> Result:
    if arguments.checkpoint is None:
        raise InputError("checkpoint: give the model to export, tp-mrs export MODEL")
    if arguments.image_size is not None:
        check_count("image_size", arguments.image_size)
    with naming("model", "path"):
        source = weights_file(arguments.checkpoint)
    suffix = ".pt2" if arguments.format == "pt2" else ".onnx"
    beside = Path(WEIGHTS) if on_hub(arguments.checkpoint) else source
    target = Path(arguments.out) if arguments.out else beside.with_suffix(suffix)
    with naming("out", "path"):
        check_format(target, arguments.format, arguments.opset)
    if target.resolve() == source.resolve():
        raise InputError(f"out: {target} is the model itself; choose another name")
    with naming("model", "path"):
        model = load(source)
    images = _images_for(model, arguments.image_size)
    check_output_folder(target.parent, files=[target.name])
    export(model, target, images, format=arguments.format, opset=arguments.opset)
    if not arguments.quiet and not arguments.json:
        print(f"Written to {target}: takes images ({', '.join(map(str, ('N', *images.shape[1:])))}) in [0, 1]")
    return {"path": str(target), "images": [None, *images.shape[1:]]}


def _images_for(model: nn.Module, image_size: int | None) -> Tensor:
    """One blank image of the size that the model was made for, unless another one is asked for."""
    recipe = getattr(model, "tp_mrs_recipe", {})
    size = image_size or recipe.get("image_size")
    if size is None:
        raise InputError("image_size: the file does not say what size of images its model takes; give --image-size")
    return torch.zeros(1, recipe.get("in_chans", 3), size, size)


def _doctor(arguments: argparse.Namespace, device: torch.device) -> Result:
    found = examine()
    if not arguments.json:
        print(summary(found))
    return found


def _completion(arguments: argparse.Namespace, device: torch.device) -> Result:
    print(completion_script(arguments.shell))
    return {}


COMMANDS: dict[str, Run] = {
    "prune": _prune,
    "finetune": _finetune,
    "sensitivity": _sensitivity,
    "evaluate": _evaluate,
    "export": _export,
    "doctor": _doctor,
    "completion": _completion,
}
