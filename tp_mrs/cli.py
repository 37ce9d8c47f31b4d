"""The command line: `tp-mrs prune | sensitivity | evaluate | export`."""

from __future__ import annotations

import argparse
import ast
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ._version import __version__
from .allocation import single_budget
from .attacks import named_attack, parse_eps
from .data import LOADERS, ImageData, load_data, make_loader, random_subset
from .dense import dense_model
from .errors import DivergenceError, InputError, check_choice, check_count, check_device
from .evaluation import Evaluation, evaluate
from .exporting import FORMATS, check_format, export
from .files import check_output_folder, write_bytes
from .finetuning import check_options as check_training_options
from .importance import BASES
from .measuring import Estimator, measure_sensitivity
from .models import create_model, normalize
from .objectives import OBJECTIVES, resolve
from .pipeline import Report, check_options, mrpf
from .storage import load, save
from .tensorfile import read


@dataclass(frozen=True)
class Preset:
    """What the options stand for when they are not given."""

    model: str = "resnet18"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    dense_epochs: float | None = None
    eps: str = "8/255"
    train_attack: str | None = None
    epochs: float = 10.0
    optimizer: str = "sgd"
    lr: float = 0.05
    batch_size: int = 128


PRESETS = {
    "digits": Preset(
        model="resnet10t",
        model_kwargs={"channels": [16, 32, 64, 128], "stem_width": 8},
        dense_epochs=12,
        eps="0.1",
        train_attack="pgd-3",
        epochs=6,
        optimizer="adamw",
        lr=0.005,
        batch_size=32,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 if training diverged, 2 for unusable input."""
    arguments = _parser().parse_args(argv)
    with _screen(quiet=arguments.quiet):
        try:
            if "data" in arguments:
                _fill_in(arguments)
            arguments.run(arguments)
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


@contextmanager
def _screen(*, quiet: bool) -> Iterator[None]:
    """Our messages on the screen, Torch-Pruning's warnings not; all as before afterwards.

    An evaluation's warnings are part of what is printed at the end, so that they are not logged, too.
    """
    wanted = {"tp_mrs": logging.ERROR if quiet else logging.INFO, "tp_mrs.evaluation": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in wanted}
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name, level in wanted.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch_pruning")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _fill_in(arguments: argparse.Namespace) -> None:
    """Give the options that were left out the values of the data set's preset."""
    check_choice("data", arguments.data, LOADERS)
    preset = PRESETS.get(arguments.data, Preset())
    if arguments.model is not None and arguments.model_kwargs is None:
        arguments.model_kwargs = {}
    for option in fields(preset):
        if getattr(arguments, option.name, None) is None:
            setattr(arguments, option.name, getattr(preset, option.name))


# --- commands ----------------------------------------------------------------------------------------------------


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
    job = _Job(arguments)
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
    _save_figure(report.plot(), out / "sensitivity")
    if arguments.json:
        print(json.dumps(report.to_dict()))
        return
    _print_report(report, f"{job.data.name}, eps {arguments.eps}")
    print(f"\nWritten to {out}: model.safetensors, report.json, sensitivity.png, sensitivity.svg")
    print(f"Load it with tp_mrs.load({str(out / 'model.safetensors')!r})")


def _sensitivity(arguments: argparse.Namespace) -> None:
    job = _Job(arguments)
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
        _save_figure(sensitivity.plot(), out / "sensitivity")
    print(json.dumps(sensitivity.to_dict()) if arguments.json else sensitivity)


def _evaluate(arguments: argparse.Namespace) -> None:
    job = _Job(arguments)
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
        _print_evaluations({"model": result}, f"{job.data.name}, eps {arguments.eps}")


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


class _Job:
    """Data, attack and model as the command line describes them; made when first asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        for name in ("batch_size", "calibration_images", "test_images"):
            if getattr(arguments, name) is not None:
                check_count(name, getattr(arguments, name))
        check_choice("estimator", arguments.estimator, get_args(Estimator))
        check_training_options(
            lr=arguments.lr, optimizer=arguments.optimizer, precision=arguments.precision, seed=arguments.seed
        )
        resolve(arguments.objective)
        self.device = _device(arguments.device)
        self.eps = parse_eps(arguments.eps)
        self.data: ImageData = load_data(
            arguments.data, arguments.data_dir, download=arguments.download, image_size=arguments.image_size
        )
        self.attack = named_attack(arguments.attack, eps=self.eps, num_classes=self.data.num_classes)
        for name in (*arguments.attacks, arguments.train_attack or "none"):
            named_attack(name, eps=self.eps, num_classes=self.data.num_classes)

    @property
    def example_inputs(self) -> Tensor:
        return torch.zeros(1, *self.data.shape, device=self.device)

    def train_loader(self) -> Any:
        arguments = self.arguments
        return make_loader(
            self.data.train,
            batch_size=arguments.batch_size,
            shuffle=True,
            seed=arguments.seed + 1,
            workers=arguments.workers,
        )

    def calibration_loader(self) -> Any:
        images = random_subset(self.data.calibration, self.arguments.calibration_images, seed=self.arguments.seed)
        return make_loader(images, batch_size=self.arguments.batch_size)

    def test_loader(self) -> Any:
        images = self.data.test
        if self.arguments.test_images is not None:
            images = random_subset(images, self.arguments.test_images, seed=0)
        return make_loader(images, batch_size=250)

    def model(self) -> nn.Module:
        """From the checkpoint; or trained on the data and kept for the next run."""
        arguments = self.arguments
        if arguments.checkpoint:
            return self._from_checkpoint()
        if arguments.dense_epochs is None:
            raise InputError(
                f"checkpoint: needed for {self.data.name}; give --checkpoint FILE.safetensors with robust weights, "
                "or --dense-epochs N to train a dense model first"
            )
        if not arguments.quiet:
            print(f"Dense {arguments.model} on {self.data.name}", flush=True)
        return dense_model(
            self.data,
            arguments.model,
            arguments=arguments.model_kwargs,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            device=self.device,
            progress=not arguments.quiet,
            eps=self.eps,
            attack=arguments.train_attack,
            epochs=arguments.dense_epochs,
            **self.training(),
        )

    def training(self) -> dict[str, Any]:
        """Arguments of `finetune`, for the dense model and the pruned one alike."""
        arguments = self.arguments
        return {
            "objective": arguments.objective,
            "optimizer": arguments.optimizer,
            "lr": arguments.lr,
            "precision": arguments.precision,
            "channels_last": True,
        }

    def _from_checkpoint(self) -> nn.Module:
        """A file of `tp_mrs.save`, or a plain state dict of the architecture."""
        path = self.arguments.checkpoint
        metadata, _ = read(path)
        return load(path, factory=None if metadata else self._dense, device=self.device)

    def _dense(self) -> nn.Module:
        """The architecture, untrained, for the data."""
        channels, size, _ = self.data.shape
        model = create_model(
            self.arguments.model,
            num_classes=self.data.num_classes,
            in_chans=channels,
            image_size=size,
            **self.arguments.model_kwargs,
        )
        return normalize(model, self.data.mean, self.data.std)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return check_device(name)


# --- what people see ---------------------------------------------------------------------------------------------


def _print_report(report: Report, what: str) -> None:
    last = report.rounds[-1]
    rows = {"dense": report.before, "pruned": last.pruned, "fine-tuned": report.after}
    title = f"{what}, {report.settings['budget']} {last.reached:.1%} of the dense model's"
    _print_evaluations({name: row for name, row in rows.items() if row is not None}, title)


def _print_evaluations(rows: dict[str, Evaluation], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(iter(rows.values()))
    caption = f"{first.images} test images; in % with 95% intervals"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    for score in first.names:
        cells = (f"{100 * row.accuracy(score):.1f} [dim]{row.interval_text(score)}[/dim]" for row in rows.values())
        table.add_row(score, *cells)
    table.add_section()
    table.add_row("MACs (M)", *(f"{row.macs / 1e6:.1f}" for row in rows.values()))
    table.add_row("params (M)", *(f"{row.params / 1e6:.3f}" for row in rows.values()))
    table.add_row("MB", *(f"{row.size_bytes / 1e6:.2f}" for row in rows.values()))
    if first.latency_ms is not None:
        table.add_row("ms, one image", *(f"{row.latency_ms or 0:.2f}" for row in rows.values()))
    Console().print(table)
    for name, row in rows.items():
        for sentence in row.warnings:
            print(f"Warning ({name}): {sentence}")


def _save_figure(figure: Any, stem: Path) -> None:
    import io

    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150)
        write_bytes(stem.with_suffix(f".{kind}"), buffer.getvalue())


# --- arguments ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tp-mrs", description="Prune networks so that the small one still withstands adversarial attacks."
    )
    parser.add_argument("--version", action="version", version=f"tp-mrs {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = _common_arguments()
    prune = _command(commands, "prune", _prune, "measure, prune, fine-tune, evaluate and save", common)
    _prune_arguments(prune)
    sensitivity = _command(commands, "sensitivity", _sensitivity, "measure which layers robustness hangs on", common)
    sensitivity.add_argument("--out", help="folder for sensitivity.json and its plot")
    sensitivity.add_argument("--steps", type=int, default=5, help="of the estimator pga (5)")
    evaluating = _command(commands, "evaluate", _evaluate, "measure clean and robust accuracy, size and speed", common)
    evaluating.add_argument("--masking", action="store_true", help="look for masked gradients, also at a large eps")
    _export_arguments(_command(commands, "export", _export, "write a saved model as ONNX or as a PyTorch program"))
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str, *parents: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        parents=parents,
    )
    command.set_defaults(run=run)
    return command


def _common_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    what = parser.add_argument_group("model and data")
    what.add_argument("--model", help="timm architecture (resnet18; digits: a narrow resnet10t)")
    what.add_argument("--model-kwargs", nargs="*", action=_KeyValues, help="its arguments, e.g. channels=32,64,128,256")
    what.add_argument("--checkpoint", help="safetensors file: from tp-mrs, or a state dict of the architecture")
    what.add_argument("--dense-epochs", type=float, help="without a checkpoint: train a dense model (digits: 12)")
    what.add_argument("--data", default="digits", help=f"one of {', '.join(LOADERS)} (digits)")
    what.add_argument("--data-dir", help="folder that holds the data set as published")
    what.add_argument("--download", action="store_true", help="let torchvision fetch it into --data-dir")
    what.add_argument("--image-size", type=int, default=224, help="of an image-folder, in pixels (224)")
    what.add_argument("--test-images", type=int, help="evaluate on so many test images (all)")
    how = parser.add_argument_group("attacks and measuring")
    how.add_argument("--eps", help="perturbation size in [0, 1] (8/255; digits: 0.1)")
    how.add_argument("--attack", default="pgd-10", help="for measuring sensitivity: any torchattacks name (pgd-10)")
    how.add_argument("--attacks", nargs="+", default=["fgsm", "pgd-20"], help="for evaluating (fgsm pgd-20)")
    how.add_argument("--estimator", default="first_order", help="of sensitivity: first_order or pga (first_order)")
    how.add_argument("--calibration-images", type=int, default=512, help="training images to measure on (512)")
    train = parser.add_argument_group("training")
    train.add_argument("--objective", default="pgd", help=f"one of {', '.join(OBJECTIVES)}, or with -awp (pgd)")
    train.add_argument("--train-attack", help="attack to train with (the objective's own; digits: pgd-3)")
    train.add_argument("--optimizer", help="timm's name (sgd; digits: adamw)")
    train.add_argument("--lr", type=float, help="peak learning rate (0.05; digits: 0.005)")
    train.add_argument("--batch-size", type=int, help="images a batch (128; digits: 32)")
    train.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of training (bf16)")
    run = parser.add_argument_group("running")
    run.add_argument("--workers", type=int, default=0, help="processes that load images (0)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (auto)")
    run.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    run.add_argument("--quiet", action="store_true", help="no progress")
    run.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pruning and fine-tuning")
    group.add_argument("--macs", type=float, help="fraction of multiply-accumulates to keep (0.5)")
    group.add_argument("--params", type=float, help="fraction of parameters to keep, instead")
    group.add_argument("--channels", type=float, help="fraction of channels to keep, instead")
    group.add_argument("--rounds", type=int, default=1, help="of measuring, pruning and fine-tuning (1)")
    group.add_argument("--alpha", type=float, default=1.0, help="how much sensitivity counts (1); 0: not at all")
    group.add_argument("--base", default="taylor", help=f"picks channels in a group: {', '.join(BASES)} (taylor)")
    group.add_argument("--min-keep", type=float, default=0.1, help="least fraction of channels a group keeps (0.1)")
    group.add_argument("--round-to", type=int, help="keep multiples of so many channels")
    group.add_argument("--epochs", type=float, help="of fine-tuning, each round (10; digits: 6)")
    group.add_argument("--out", default="tp-mrs-run", help="folder for the results (tp-mrs-run)")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="MODEL", help="safetensors file from tp-mrs prune or tp_mrs.save")
    parser.add_argument("--format", help=f"{' or '.join(FORMATS)} (what --out ends in, else onnx)")
    parser.add_argument("--out", help="the file to write (beside MODEL, with the format's ending)")
    parser.add_argument("--image-size", type=int, help="of the images it will take, in pixels (as the model was made)")
    parser.add_argument("--opset", type=int, help="version of ONNX's operators (PyTorch's choice)")
    parser.add_argument("--quiet", action="store_true", help="print nothing")


class _KeyValues(argparse.Action):
    """`key=value` pairs; values are Python literals where they can be, else text."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        pairs: dict[str, Any] = {}
        for value in values:
            key, separator, text = value.partition("=")
            if not separator:
                parser.error(f"model-kwargs: expected key=value, got {value!r}")
            try:
                pairs[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                pairs[key] = text
        setattr(namespace, self.dest, pairs)


if __name__ == "__main__":
    sys.exit(main())
