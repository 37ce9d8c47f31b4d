"""What the command line describes, made: data, loaders, attack, and the model to work on."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tp_mrs.attacks import AttackFactory, named_attack, parse_eps
from tp_mrs.batches import num_classes
from tp_mrs.data import ImageData, hold_out, load_data, make_loader, random_subset
from tp_mrs.dense import cache_folder, dense_file, dense_model, new_model
from tp_mrs.errors import InputError, check_choice, check_count, check_path, naming
from tp_mrs.files import check_output_folder
from tp_mrs.finetuning import check_options
from tp_mrs.hub import WEIGHTS, weights_file
from tp_mrs.measuring import Estimator
from tp_mrs.models import left_untrained
from tp_mrs.objectives import Objective, ard, awp, resolve, rslad
from tp_mrs.processes import place
from tp_mrs.storage import load
from tp_mrs.tensorfile import read

from .arguments import PRESETS, Preset
from .config import check_same_run
from .launch import first_one_first
from .preview import attack_passes, evaluation_passes, training_passes

logger = logging.getLogger(__name__)
EVALUATION_BATCH = 250
_OTHER_DATA = "give a model made for this data, or its own data (--data)"
DISTILLATION = {"ard": ard, "rslad": rslad}  # objectives that learn from a teacher


class Job:
    """Data, attacks and model as the command line describes them; made when first asked for.

    Args:
        arguments: of a command, without gaps (`fill_in`).
        device: this process's.

    Raises:
        InputError: an argument is unusable, or a file.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments, self.device = arguments, device
        if arguments.pretrained and arguments.checkpoint:
            raise InputError("pretrained: the weights come from the checkpoint; leave out --pretrained or --checkpoint")
        for name, value in self._given("batch_size", "calibration_images", "test_images", "steps").items():
            check_count(name, value)
        check_count("workers", arguments.workers, low=0)
        check_choice("estimator", getattr(arguments, "estimator", "first_order"), get_args(Estimator))
        check_options(
            lr=arguments.lr,
            optimizer=arguments.optimizer,
            precision=arguments.precision,
            seed=arguments.seed,
            **self._given("accumulate"),
        )
        self._check_objective()
        self.eps = parse_eps(arguments.eps)
        download = arguments.download and not self._given("dry_run")
        with first_one_first(needed=download):
            self.data: ImageData = load_data(
                arguments.data, arguments.data_dir, download=download, image_size=arguments.image_size
            )
        self.validation: Dataset[Any] | None = None
        if self._given("validation_images"):
            self.data, self.validation = hold_out(self.data, arguments.validation_images, seed=arguments.seed)
        with naming("more_eps"):
            sizes = {parse_eps(size) for size in self._given("more_eps").get("more_eps", [])}
        self.more_eps = sorted(sizes - {self.eps})
        with naming("attacks", "attack"):
            for name in arguments.attacks:
                self._named(name)
        for option, name in self._given("attack", "train_attack").items():
            with naming(option):
                self._named(name)

    @property
    def attack(self) -> AttackFactory:
        """For measuring."""
        return self._named(self.arguments.attack)

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
        return make_loader(images, batch_size=EVALUATION_BATCH)

    def model(self) -> nn.Module:
        """From the checkpoint, or timm's with its weights; or trained on the data and kept for the next run."""
        arguments = self.arguments
        given = self._given_model()
        if given is not None:
            return given
        if arguments.dense_epochs is None:
            raise InputError(
                f"checkpoint: needed for {self.data.name}; give --checkpoint FILE.safetensors with robust weights, "
                "or --dense-epochs N to train a dense model first"
            )
        logger.info("dense %s on %s", arguments.model, self.data.name)
        return dense_model(self.data, arguments.model, **self._dense_training(), progress=not arguments.quiet)

    def known_model(self) -> nn.Module | None:
        """The same if it needs no training; None if it does, or if nothing says for how long."""
        given = self._given_model()
        if given is not None:
            return given
        kept = dense_file(self.data, self.arguments.model, **self._dense_training())
        return load(kept, device=self.device) if kept.exists() else None

    def _given_model(self) -> nn.Module | None:
        """The checkpoint's, or timm's with its weights, unless a dense model is to be trained from these first."""
        arguments = self.arguments
        if arguments.checkpoint:
            return self._load("checkpoint", arguments.checkpoint)
        if not arguments.pretrained or self._given("dense_epochs"):
            return None
        model, (_, size, _) = self.untrained(), self.data.shape
        untrained = left_untrained(model, size)
        if untrained and "dense_epochs" in arguments:  # else the command trains it
            raise InputError(
                f"pretrained: on {self.data.name} the weights of {arguments.model} leave untrained: {untrained}; "
                "train the model first, with --dense-epochs N or tp-mrs finetune --pretrained"
            )
        return model

    def _model_arguments(self) -> dict[str, Any]:
        """Of `create_model`, besides those that the data decides."""
        return self.arguments.model_kwargs | ({"pretrained": True} if self.arguments.pretrained else {})

    def _dense_training(self) -> dict[str, Any]:
        arguments = self.arguments
        return {
            "arguments": self._model_arguments(),
            "batch_size": arguments.batch_size,
            "seed": arguments.seed,
            "device": self.device,
            "cache": _dense_cache(),
            "eps": self.eps,
            "attack": arguments.train_attack,
            "epochs": arguments.dense_epochs,
            **self.training(),
        }

    def untrained(self) -> nn.Module:
        """The architecture for the data, not trained on it."""
        arguments = self.arguments
        model = new_model(self.data, arguments.model, self._model_arguments(), seed=arguments.seed)
        return model.to(self.device).eval()

    def training(self) -> dict[str, Any]:
        """Arguments of `finetune`, for the dense model and the pruned one alike."""
        arguments = self.arguments
        return {
            "objective": arguments.objective,
            "optimizer": arguments.optimizer,
            "lr": arguments.lr,
            "precision": arguments.precision,
            "channels_last": True,
            **self._given("accumulate"),
        }

    def finetuning(self) -> dict[str, Any]:
        """All arguments of `finetune` that the command of that name has; those that were not given are left out."""
        arguments = self.arguments
        training = self.training() | self._given("patience", "ema")
        if self.validation is not None:
            training["validation_data"] = make_loader(self.validation, batch_size=EVALUATION_BATCH)
        return training | {
            "objective": self._objective(),
            "attack": arguments.train_attack,
            "eps": self.eps,
            "epochs": arguments.epochs,
            "seed": arguments.seed,
            "progress": not arguments.quiet,
        }

    def passes(self, *, dense: bool, layers: int) -> dict[str, float]:
        """Part of `tp-mrs prune` → about how many passes over the training images it takes, forward and backward.

        Args:
            dense: a dense model is to be trained, too.
            layers: how many are measured, if need be one by one.
        """
        arguments = self.arguments
        loaders = self.train_loader(), self.calibration_loader(), self.test_loader()
        images, calibration, tested = (len(loader.dataset) for loader in loaders)
        epoch = training_passes(arguments.objective, arguments.train_attack)
        ascent = 5 * layers if arguments.estimator == "pga" else 0
        evaluations = 1 + arguments.rounds + (arguments.epochs > 0) + 2 * len(self.more_eps)
        once = attack_passes(arguments.attack) + 1 + ascent
        return {
            **({"training a dense model": epoch * (arguments.dense_epochs or 0)} if dense else {}),
            "measuring": arguments.rounds * arguments.iterative_steps * once * calibration / images,
            "fine-tuning": arguments.rounds * epoch * arguments.epochs,
            "evaluating": evaluations * evaluation_passes(arguments.attacks) * tested / images,
        }

    def output_folder(self, *files: str) -> Path:
        """The folder for the results, ready for these files, and not the one that the checkpoint would be lost from.

        Raises:
            InputError: it cannot be written, or `model.safetensors` in it is what the command reads.
        """
        folder = check_path("out", self.arguments.out)
        read = self._given("checkpoint", "teacher") if WEIGHTS in files else {}
        for name, path in read.items():
            with naming(name, "path"):
                file = weights_file(path)
            if file.resolve() == (folder / WEIGHTS).resolve():
                raise InputError(f"out: the results would replace the {name} {path}; choose another folder")
        check_same_run(folder, self.arguments)
        return check_output_folder(folder, files=files)

    def _given(self, *names: str) -> dict[str, Any]:
        """Those of the arguments that the command has and that have a value."""
        values = {name: getattr(self.arguments, name, None) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def _named(self, attack: str) -> AttackFactory:
        return named_attack(attack, eps=self.eps, num_classes=self.data.num_classes)

    def _check_objective(self) -> None:
        """Raise `InputError` unless the objective is known, and has a teacher if it is one that learns from it."""
        objective, teacher = self.arguments.objective, self._given("teacher")
        if "teacher" not in self.arguments or objective.removesuffix("-awp") not in DISTILLATION:
            resolve(objective)
            if teacher:
                raise InputError(
                    f"teacher: {objective} learns from labels; for a teacher take --objective ard or rslad"
                )
        elif not teacher:
            raise InputError(
                f"teacher: {objective} needs a robust model to learn from; give --teacher FILE.safetensors"
            )

    def _objective(self) -> str | Objective:
        """By name, or with its teacher."""
        name = self.arguments.objective
        kind = name.removesuffix("-awp")
        if kind not in DISTILLATION:
            return str(name)
        objective = DISTILLATION[kind](self._load("teacher", self.arguments.teacher))
        return objective if kind == name else awp(objective)

    def _load(self, argument: str, path: str) -> nn.Module:
        """A file of `tp_mrs.save`, or a plain state dict of the architecture, made for the data."""
        with naming(argument, "path"):
            path = str(weights_file(path))
            metadata, tensors = read(path)
            if not metadata:
                self._check_made_for_data(path, _made_for(tensors, self.untrained(), channels=self.data.shape[0]))
            model = load(path, factory=None if metadata else self.untrained, device=self.device)
            try:
                classes = num_classes(model, self.example_inputs)
            except InputError as error:
                raise InputError(f"path: {path} does not fit {self.data.name} ({error}); {_OTHER_DATA}") from error
            self._check_made_for_data(path, {"classes": classes})
            if argument == "checkpoint":
                self._check_architecture(path, model)
        return model

    def _check_architecture(self, path: str, model: nn.Module) -> None:
        """Raise `InputError` if the file tells that it holds another architecture than `--model` asks for."""
        asked, found = self.arguments.model, getattr(model, "tp_mrs_recipe", {}).get("architecture", "")
        if asked == PRESETS.get(self.arguments.data, Preset()).model or not all(map(timm.is_model, (asked, found))):
            return  # not asked for; or one of them is a name on the hub, or of a folder
        if asked.partition(".")[0] != found.partition(".")[0]:
            raise InputError(f"model: {path} holds a {found}, not a {asked}; leave out --model, or choose another file")

    def _check_made_for_data(self, path: str, found: Mapping[str, int]) -> None:
        data = self.data
        for what, count in {"channels": data.shape[0], "classes": data.num_classes}.items():
            if found.get(what, count) != count:
                raise InputError(
                    f"path: the model in {path} has {found[what]} {what}, but {data.name} has {count}; {_OTHER_DATA}"
                )


def _made_for(tensors: Mapping[str, Tensor], architecture: Any, *, channels: int) -> dict[str, int]:
    """How many channels and classes a state dict is for, as far as it tells.

    By the sizes of the architecture's first layer that takes so many channels, and of its classifier.
    """
    names = {module: name for name, module in architecture.named_modules()}
    first = next((module for module in names if getattr(module, "in_channels", None) == channels), None)
    found = {}
    for what, layer, axis in (("channels", first, 1), ("classes", architecture.get_classifier(), 0)):
        weight = tensors.get(f"{names.get(layer)}.weight")
        if weight is not None and weight.dim() > axis:
            found[what] = weight.shape[axis]
    return found


def _dense_cache() -> Path | None:
    """Where dense models are kept: apart for each number of processes, as all their batches make one update."""
    count = place()[1]
    return None if count == 1 else cache_folder() / f"{count}-processes"
