"""What the command line describes, made: data, loaders, attack, and the model to work on."""

from __future__ import annotations

import argparse
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .attacks import named_attack, parse_eps
from .data import ImageData, load_data, make_loader, random_subset
from .dense import dense_model
from .errors import InputError, check_choice, check_count, check_device
from .finetuning import check_options
from .measuring import Estimator
from .models import create_model, normalize
from .objectives import resolve
from .storage import load
from .tensorfile import read


class Job:
    """Data, attack and model as the command line describes them; made when first asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        for name in ("batch_size", "calibration_images", "test_images"):
            if getattr(arguments, name) is not None:
                check_count(name, getattr(arguments, name))
        check_choice("estimator", arguments.estimator, get_args(Estimator))
        check_options(
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
