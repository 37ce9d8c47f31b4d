"""The commands of `tp-mrs`, their options, and what these stand for when they are not given."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tp_mrs._version import __version__
from tp_mrs.data import LOADERS
from tp_mrs.errors import check_choice
from tp_mrs.exporting import FORMATS
from tp_mrs.importance import BASES
from tp_mrs.objectives import OBJECTIVES

from .config import parse_with_config


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


SHELLS = ("bash", "zsh", "fish")
BUDGETS = ("macs", "params", "channels")

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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command, from the command line, a file with `--config`, and the data set's preset."""
    arguments = parse_with_config(parser(), argv)
    if "data" in arguments:
        fill_in(arguments)
    return arguments


def fill_in(arguments: argparse.Namespace) -> None:
    """Give the options that were left out the values of the data set's preset."""
    check_choice("data", arguments.data, LOADERS)
    preset = PRESETS.get(arguments.data, Preset())
    if arguments.model is not None and arguments.model_kwargs is None:
        arguments.model_kwargs = {}
    if arguments.pretrained:  # weights are for timm's own sizes, and come in place of training
        preset = replace(preset, model_kwargs={}, dense_epochs=None)
    for option in fields(preset):
        if option.name in arguments and getattr(arguments, option.name) is None:
            setattr(arguments, option.name, getattr(preset, option.name))


def parser() -> argparse.ArgumentParser:
    """The parser of `tp-mrs`; it leaves the name of the command in `command`."""
    parser = argparse.ArgumentParser(
        prog="tp-mrs", description="Prune networks so that the small one still withstands adversarial attacks."
    )
    parser.add_argument("--version", action="version", version=f"tp-mrs {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    model, attacks, running = _model_and_data(dense=True), _attacks(), _running()
    shared = [model, _measuring(), attacks, _training("training"), running]
    _command(commands, "prune", "measure, prune, fine-tune, evaluate and save", _pruning(), *shared)
    own = [_finetuning(), _model_and_data(dense=False), attacks, _training("training"), running]
    _command(commands, "finetune", "train a saved model against attacks, evaluate and save", *own)
    shared = [model, _measuring(), attacks, _training("training of a dense model"), running]
    sensitivity = _command(commands, "sensitivity", "measure which layers robustness hangs on", *shared)
    sensitivity.add_argument("--out", metavar="DIR", help="folder for sensitivity.json and its plot")
    sensitivity.add_argument("--steps", type=int, default=5, help="of the estimator pga (5)")
    evaluating = _command(commands, "evaluate", "measure clean and robust accuracy, size and speed", *shared)
    evaluating.add_argument("--out", metavar="DIR", help="folder for evaluation.json and, with --more-eps, a plot")
    _more_eps(evaluating)
    _flag(evaluating, "--masking", "look for masked gradients, also at a large eps")
    exporting = _command(commands, "export", "write a saved model as ONNX or as a PyTorch program", takes="MODEL")
    _exporting(exporting)
    doctor = _command(commands, "doctor", "show versions, devices, what is missing, and the cache")
    _flag(doctor, "--json", "print the result as JSON, and nothing else")
    completion = _command(
        commands, "completion", "print what lets a shell complete commands and options", takes="SHELL"
    )
    completion.add_argument("shell", metavar="SHELL", help=f"one of {', '.join(SHELLS)}")
    return parser


def _command(
    commands: Any, name: str, text: str, *parents: argparse.ArgumentParser, takes: str = ""
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        parents=parents,
        formatter_class=_Help,
        usage=f"tp-mrs {name} [options] {takes}".rstrip(),
    )
    return command


class _Help(argparse.HelpFormatter):
    """Short names for the options' values: `N` for a whole number, `X` for another one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=27)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type is int else "X" if action.type is float else "NAME"


def _group(title: str) -> tuple[argparse.ArgumentParser, Any]:
    """A parent for the commands that share a group of options, and the group."""
    parent = argparse.ArgumentParser(add_help=False)
    return parent, parent.add_argument_group(title)


def _pruning() -> argparse.ArgumentParser:
    parent, group = _group("pruning and fine-tuning")
    group.add_argument("--macs", type=float, help="fraction of multiply-accumulates to keep (0.5)")
    group.add_argument("--params", type=float, help="fraction of parameters to keep, instead")
    group.add_argument("--channels", type=float, help="fraction of channels to keep, instead")
    group.add_argument("--rounds", type=int, default=1, help="of pruning and fine-tuning (1)")
    group.add_argument("--iterative-steps", type=int, default=4, help="of measuring and pruning, each round (4)")
    group.add_argument("--alpha", type=float, default=0.5, help="how much sensitivity counts (0.5); 0: not at all")
    group.add_argument(
        "--base", default="sensitivity", help=f"picks channels in a group: {', '.join(BASES)} (sensitivity)"
    )
    _flag(group, "--compensate", "let layers make up for channels they lose, untrained (on)", default=True)
    group.add_argument("--min-keep", type=float, default=0.1, help="least fraction of channels a group keeps (0.1)")
    group.add_argument("--round-to", type=int, help="keep multiples of so many channels")
    group.add_argument("--epochs", type=float, help="of fine-tuning, each round (10; digits: 6)")
    _more_eps(group)
    group.add_argument("--out", metavar="DIR", default="tp-mrs-run", help="folder for the results (tp-mrs-run)")
    _flag(group, "--dry-run", "show what would be pruned and what it costs; train and write nothing")
    return parent


def _more_eps(options: Any) -> None:
    options.add_argument("--more-eps", nargs="+", metavar="X", help="evaluate at these sizes, too, for a curve (none)")


def _finetuning() -> argparse.ArgumentParser:
    parent, group = _group("fine-tuning")
    group.add_argument("--epochs", type=float, help="over the training images (10; digits: 6)")
    group.add_argument("--teacher", metavar="FILE", help="robust model to learn from, with --objective ard or rslad")
    group.add_argument("--validation-images", type=int, metavar="N", help="hold out so many training images (none)")
    group.add_argument("--patience", type=int, metavar="N", help="stop after N epochs without gain on these (never)")
    group.add_argument("--ema", type=float, metavar="DECAY", help="average the weights, such as 0.999 (not)")
    group.add_argument(
        "--out", metavar="DIR", default="tp-mrs-finetuned", help="folder for the results (tp-mrs-finetuned)"
    )
    return parent


def _model_and_data(*, dense: bool) -> argparse.ArgumentParser:
    """With `dense`, for commands that can train a model to start from."""
    parent, group = _group("model and data")
    group.add_argument("--model", help="timm architecture, hf-hub:owner/name too (resnet18; digits: narrow resnet10t)")
    group.add_argument(
        "--model-kwargs", metavar="K=V", nargs="*", action=_KeyValues, help="its arguments: channels=32,64,128,256 …"
    )
    group.add_argument(
        "--checkpoint", metavar="FILE", help="safetensors: what tp-mrs wrote, or a state dict of --model"
    )
    _flag(group, "--pretrained", "without a checkpoint: start from the weights that timm has for --model")
    if dense:
        group.add_argument("--dense-epochs", type=float, help="without a checkpoint: train a dense model (digits: 12)")
    group.add_argument("--data", default="digits", help=f"one of {', '.join(LOADERS)} (digits)")
    group.add_argument("--data-dir", metavar="DIR", help="folder that holds the data set as published")
    _flag(group, "--download", "fetch CIFAR or SVHN into --data-dir if not there")
    group.add_argument("--image-size", type=int, help="of an image-folder, in pixels (224)")
    return parent


def _attacks() -> argparse.ArgumentParser:
    parent, group = _group("attacks and evaluating")
    group.add_argument("--eps", metavar="X", help="perturbation size in [0, 1] (8/255; digits: 0.1)")
    group.add_argument("--attacks", nargs="+", default=["fgsm", "pgd-20"], help="for evaluating (fgsm pgd-20)")
    group.add_argument("--test-images", type=int, help="evaluate on so many test images (all)")
    return parent


def _measuring() -> argparse.ArgumentParser:
    parent, group = _group("measuring")
    group.add_argument("--attack", default="pgd-10", help="for measuring sensitivity: a torchattacks name (pgd-10)")
    group.add_argument("--estimator", default="first_order", help="of sensitivity: first_order or pga (first_order)")
    group.add_argument("--calibration-images", type=int, default=512, help="training images to measure on (512)")
    return parent


def _training(title: str) -> argparse.ArgumentParser:
    parent, group = _group(title)
    group.add_argument("--objective", default="pgd", help=f"{', '.join(OBJECTIVES)}, each also with -awp (pgd)")
    group.add_argument("--train-attack", help="attack to train with (the objective's own; digits: pgd-3)")
    group.add_argument("--optimizer", help="timm's name (sgd; digits: adamw)")
    group.add_argument("--lr", type=float, help="peak learning rate (0.05; digits: 0.005)")
    group.add_argument("--batch-size", type=int, help="images a batch, in each process (128; digits: 32)")
    group.add_argument("--accumulate", type=int, metavar="N", help="batches whose gradients make one update (1)")
    group.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of training (bf16)")
    return parent


def _running() -> argparse.ArgumentParser:
    parent, group = _group("running")
    group.add_argument("--workers", type=int, default=0, help="processes that load images (0)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (auto)")
    group.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    _speaking(group, quiet="no progress")
    return parent


def _speaking(options: Any, *, quiet: str) -> None:
    """The options of all commands that do work: where else they are given, and what is printed."""
    options.add_argument("--config", metavar="FILE", help="options not given here: YAML or JSON, such as OUT/run.yaml")
    _flag(options, "--quiet", quiet)
    _flag(options, "--json", "print the result as JSON, and nothing else")


def _flag(options: Any, name: str, text: str, *, default: bool = False) -> None:
    """An option that is on or off, by default off; `--no-…` takes it back, where a file has it on."""
    options.add_argument(name, action=argparse.BooleanOptionalAction, help=text).default = default


def _exporting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="MODEL", nargs="?", help="safetensors file from tp-mrs prune or tp_mrs.save"
    )
    parser.add_argument("--format", help=f"{' or '.join(FORMATS)} (what --out ends in, else onnx)")
    parser.add_argument("--out", help="the file to write (beside MODEL, with the format's ending)")
    parser.add_argument("--image-size", type=int, help="of the images it will take, in pixels (as the model was made)")
    parser.add_argument("--opset", type=int, help="version of ONNX's operators (PyTorch's choice)")
    _speaking(parser, quiet="print nothing")


class _KeyValues(argparse.Action):
    """`key=value` pairs; values are Python literals where they can be, else text."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        pairs: dict[str, Any] = {}
        for value in values:
            key, separator, text = value.partition("=")
            if not separator:
                parser.error(f"model-kwargs: expected key=value, got {value!r}")
            try:
                pairs[key] = _listed(ast.literal_eval(text))
            except (ValueError, SyntaxError):
                pairs[key] = text
        setattr(namespace, self.dest, pairs)


def _listed(value: Any) -> Any:
    """The same with lists for tuples, as it will be read from a file."""
    return [_listed(each) for each in value] if isinstance(value, tuple | list) else value
