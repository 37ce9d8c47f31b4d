"""The command line: `tp-mrs prune | sensitivity | evaluate`."""

from __future__ import annotations

import argparse
import ast
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._version import __version__
from .allocation import single_budget
from .attacks import named_attack, parse_eps
from .data import LOADERS, ImageData, load_data, make_loader, random_subset
from .dense import dense_model
from .errors import DivergenceError, InputError, check_choice, check_count, check_number
from .evaluation import Evaluation, evaluate
from .files import check_output_folder, write_bytes
from .importance import BASES
from .models import create_model, normalize
from .objectives import OBJECTIVES, resolve
from .pipeline import Report, mrpf
from .sensitivity import measure_sensitivity
from .storage import fit_shapes, load, read, save

DEFAULT_MODEL = "resnet18"
DEFAULT_ARGUMENTS = {"channels": [16, 32, 64, 128]}
DEFAULT_EPS = {"digits": "0.1"}
DENSE_EPOCHS = {"digits": 12.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 if training diverged, 2 for unusable input."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tp_mrs").setLevel(logging.ERROR if arguments.quiet else logging.INFO)
    warnings.filterwarnings("ignore", module="torch_pruning")
    try:
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


# --- commands ----------------------------------------------------------------------------------------------------


def _prune(arguments: argparse.Namespace) -> None:
    if arguments.macs is None and arguments.params is None and arguments.channels is None:
        arguments.macs = 0.5
    single_budget(macs=arguments.macs, params=arguments.params, channels=arguments.channels)
    check_number("epochs", arguments.epochs, low=0)
    check_number("lr", arguments.lr, low=0, high=10, open_low=True)
    check_choice("base", arguments.base, BASES)
    resolve(arguments.objective)
    out = check_output_folder(arguments.out)
    job = _Job(arguments)
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
        objective=arguments.objective,
        lr=arguments.lr,
        precision=arguments.precision,
        channels_last=True,
    )
    save(model, out / "model.safetensors")
    report.save(out / "report.json")
    _save_figure(report.plot(), out / "sensitivity")
    if arguments.json:
        print(json.dumps(report.to_dict()))
        return
    _print_report(report, job)
    print(f"\nWritten to {out}: model.safetensors, report.json, sensitivity.png, sensitivity.svg")
    print(f"Load it with tp_mrs.load({str(out / 'model.safetensors')!r})")


def _sensitivity(arguments: argparse.Namespace) -> None:
    out = check_output_folder(arguments.out) if arguments.out else None
    job = _Job(arguments)
    sensitivity = measure_sensitivity(
        job.model(),
        job.calibration_loader(),
        job.attack,
        example_inputs=job.example_inputs,
        estimator=arguments.estimator,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    if out is not None:
        sensitivity.save(out / "sensitivity.json")
        _save_figure(sensitivity.plot(), out / "sensitivity")
    print(sensitivity)


def _evaluate(arguments: argparse.Namespace) -> None:
    job = _Job(arguments)
    result = evaluate(
        job.model(),
        job.test_loader(),
        arguments.attacks,
        eps=job.eps,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    if arguments.json:
        print(json.dumps(result.to_dict()))
    else:
        _print_evaluations({"model": result}, f"{job.data.name}, eps {arguments.eps or DEFAULT_EPS.get(job.data.name)}")


class _Job:
    """Data, attack and model as the command line describes them; made when first asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        check_count("batch-size", arguments.batch_size)
        check_count("calibration-images", arguments.calibration_images)
        if arguments.test_images is not None:
            check_count("test-images", arguments.test_images)
        self.device = _device(arguments.device)
        self.eps_text = arguments.eps or DEFAULT_EPS.get(arguments.data, "8/255")
        self.eps = parse_eps(self.eps_text)
        self.data: ImageData = load_data(
            arguments.data, arguments.data_dir, download=arguments.download, image_size=arguments.image_size
        )
        self.attack = named_attack(arguments.attack, eps=self.eps, num_classes=self.data.num_classes)
        for name in arguments.attacks:
            named_attack(name, eps=self.eps)

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
        architecture, options = self._architecture()
        if arguments.checkpoint:
            return self._from_checkpoint(architecture, options)
        epochs = arguments.dense_epochs or DENSE_EPOCHS.get(self.data.name)
        if epochs is None:
            raise InputError(
                f"checkpoint: needed for {self.data.name}; give --checkpoint FILE.safetensors with robust weights, "
                "or --dense-epochs N to train a dense model first"
            )
        if not arguments.quiet:
            print(
                f"Dense {architecture} on {self.data.name}: cached, or trained for {epochs:g} epochs",
                flush=True,
            )
        return dense_model(
            self.data,
            architecture,
            arguments=options,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            device=self.device,
            progress=not arguments.quiet,
            objective=arguments.objective,
            eps=self.eps,
            epochs=epochs,
            lr=0.1,
            precision=arguments.precision,
            channels_last=True,
        )

    def _architecture(self) -> tuple[str, dict[str, Any]]:
        options = dict(self.arguments.model_kwargs or {})
        if self.arguments.model is None:
            return DEFAULT_MODEL, {**DEFAULT_ARGUMENTS, **options}
        return self.arguments.model, options

    def _from_checkpoint(self, architecture: str, options: dict[str, Any]) -> nn.Module:
        """A file of `tp_mrs.save`, or a plain state dict of the architecture."""
        path = self.arguments.checkpoint
        metadata, tensors = read(path)
        if metadata is not None:
            return load(path, device=self.device)
        channels, size, _ = self.data.shape
        model = create_model(
            architecture, num_classes=self.data.num_classes, in_chans=channels, image_size=size, **options
        )
        fit_shapes(model, tensors, source=path)
        model.load_state_dict(tensors)
        return normalize(model, self.data.mean, self.data.std).to(self.device).eval()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: cannot use {name!r} here ({error}); try --device cpu") from error


# --- what people see ---------------------------------------------------------------------------------------------


def _print_report(report: Report, job: _Job) -> None:
    last = report.rounds[-1]
    rows = {"dense": report.before, "pruned": last.pruned, "fine-tuned": report.after}
    title = f"{job.data.name}, eps {job.eps_text}, {report.settings['budget']} {last.reached:.1%} of the dense model's"
    _print_evaluations({name: row for name, row in rows.items() if row is not None}, title)


def _print_evaluations(rows: dict[str, Evaluation], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(iter(rows.values()))
    table = Table(title=title, title_justify="left", caption=f"{first.images} test images", caption_justify="left")
    table.add_column("")
    for heading in ("clean", *first.robust, "MACs (M)", "params (M)", "latency (ms)"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        scores = [f"{value:.1%}" for value in (row.clean, *row.robust.values())]
        latency = "" if row.latency_ms is None else f"{row.latency_ms:.2f}"
        table.add_row(name, *scores, f"{row.macs / 1e6:.1f}", f"{row.params / 1e6:.3f}", latency)
    Console().print(table)


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
    _command(commands, "evaluate", _evaluate, "measure clean and robust accuracy, size and speed", common)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str, common: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        parents=[common],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _common_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    what = parser.add_argument_group("model and data")
    what.add_argument("--model", help=f"timm architecture; without it a narrow {DEFAULT_MODEL}")
    what.add_argument("--model-kwargs", nargs="*", action=_KeyValues, help="its arguments, e.g. channels=32,64,128,256")
    what.add_argument("--checkpoint", help="safetensors file: from tp-mrs, or a state dict of the architecture")
    what.add_argument("--dense-epochs", type=float, help="without a checkpoint: epochs to train the dense model")
    what.add_argument("--data", default="digits", help=f"one of {', '.join(LOADERS)}")
    what.add_argument("--data-dir", help="folder that holds the data set as published")
    what.add_argument("--download", action="store_true", help="let torchvision fetch it into --data-dir")
    what.add_argument("--image-size", type=int, default=224, help="of an image-folder, in pixels")
    what.add_argument("--test-images", type=int, help="evaluate on so many test images (default: all)")
    how = parser.add_argument_group("attacks and measuring")
    how.add_argument("--eps", help="perturbation size in [0, 1], e.g. 8/255 (default: 8/255; digits: 0.1)")
    how.add_argument("--attack", default="pgd-10", help="for measuring sensitivity: any torchattacks name")
    how.add_argument("--attacks", nargs="+", default=["fgsm", "pgd-20"], help="for evaluating, e.g. pgd-20 autoattack")
    how.add_argument("--objective", default="pgd", help=f"of adversarial training: {', '.join(OBJECTIVES)}")
    how.add_argument("--estimator", default="first_order", help="of sensitivity: first_order or pga")
    how.add_argument("--calibration-images", type=int, default=512, help="training images to measure on")
    run = parser.add_argument_group("running")
    run.add_argument("--batch-size", type=int, default=64)
    run.add_argument("--workers", type=int, default=0, help="processes that load images")
    run.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of training")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--quiet", action="store_true", help="no progress")
    run.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pruning and fine-tuning")
    group.add_argument("--macs", type=float, help="fraction of multiply-accumulates to keep (0.5 if none is given)")
    group.add_argument("--params", type=float, help="fraction of parameters to keep, instead")
    group.add_argument("--channels", type=float, help="fraction of channels to keep, instead")
    group.add_argument("--rounds", type=int, default=1, help="of measuring, pruning and fine-tuning")
    group.add_argument("--alpha", type=float, default=1.0, help="how much sensitivity counts; 0: not at all")
    group.add_argument("--base", default="taylor", help=f"which channels go in a group: {', '.join(BASES)}")
    group.add_argument("--min-keep", type=float, default=0.1, help="least fraction of channels a group keeps")
    group.add_argument("--round-to", type=int, help="keep multiples of so many channels")
    group.add_argument("--epochs", type=float, default=6.0, help="of fine-tuning, each round")
    group.add_argument("--lr", type=float, default=0.05, help="peak learning rate of fine-tuning")
    group.add_argument("--out", default="tp-mrs-run", help="folder for the results")


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
