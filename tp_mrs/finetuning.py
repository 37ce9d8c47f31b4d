"""Adversarial fine-tuning with any objective, on accelerate."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .attacks import AttackLike, Perturb, bind, describe, named_attack, parse_eps
from .batches import num_classes, pairs
from .borrowing import preserved_flags, preserved_rng
from .errors import (
    DivergenceError,
    InputError,
    check_batch,
    check_choice,
    check_count,
    check_number,
    device_of,
)
from .numerics import Precision, autocast, check_precision, in_channels_last
from .objectives import Objective, Recipe, check_loss, name_of, resolve

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epoch:
    """What one pass over the data, or the last part of one, came to."""

    epoch: int
    images: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class Finetuning:
    """The record of a fine-tuning run: settings and, per epoch, the mean training loss."""

    settings: dict[str, Any]
    history: tuple[Epoch, ...]

    @property
    def images(self) -> int:
        """Training images seen, each as often as it came."""
        return sum(epoch.images for epoch in self.history)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def finetune(
    model: nn.Module,
    train_data: Iterable[Any],
    *,
    objective: str | Objective = "pgd",
    attack: str | AttackLike | None = None,
    eps: float = 8 / 255,
    epochs: float = 1,
    lr: float = 0.05,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: Literal["cosine", "constant"] = "cosine",
    warmup: float = 0.1,
    clip_norm: float | None = 1.0,
    accumulate: int = 1,
    precision: Precision = "fp32",
    channels_last: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Finetuning:
    """Train `model` in place against attacks.

    Weights and buffers change; training flags, `requires_grad`, `.grad` and random state are as before afterwards.
    Parameters with `requires_grad=False` stay as they are, and a BatchNorm with only such parameters keeps its
    running statistics.

    Args:
        model: on the device to train on.
        train_data: sized and re-iterable, of `(images, labels)`: (N, C, H, W) in [0, 1] and (N,). A `DataLoader`, or
            a list of batches.
        objective: `"standard"`, `"fgsm"`, `"pgd"`, `"trades"`, `"mart"`, each also with adversarial weight perturbation
            as in `"trades-awp"`, or a function `(model, images, labels, attack) -> loss`, such as
            `tp_mrs.objectives.rslad(teacher)`.
        attack: replaces the objective's own attack, which for a function is `"pgd-7"`: a name such as `"pgd-3"`, a
            torchattacks attack on `model`, or a factory.
        eps: perturbation size of an attack given by name and of the objective's own, in units of the image range.
        epochs: passes over `train_data`; fractions count in batches.
        lr: peak learning rate.
        optimizer: a name from `timm.optim.list_optimizers()`; `"sgd"` is Nesterov's there.
        momentum: of optimisers that have one.
        weight_decay: not applied to biases and norms (timm's rule).
        schedule: `"cosine"` to 0, or `"constant"`; stepped every update.
        warmup: fraction of the run over which the learning rate rises linearly.
        clip_norm: largest L2 norm of the gradient; None for no limit.
        accumulate: batches whose gradients add up to one update, as if they were one batch (but for BatchNorm).
        precision: `"bf16"` runs attack and update under autocast.
        channels_last: train in that memory layout; often faster for convolutions.
        seed: of attacks' random starts and dropout.
        progress: show a bar on a terminal.

    Raises:
        InputError: an argument or a batch is unusable; nothing was changed if it is an argument.
        DivergenceError: the loss stopped being finite.
    """
    settings: dict[str, Any] = {
        "epochs": epochs,
        "lr": lr,
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "warmup": warmup,
        "clip_norm": clip_norm,
        "accumulate": accumulate,
        "precision": precision,
        "channels_last": channels_last,
        "seed": seed,
    }
    batches = _check_length(train_data)
    _check_trainable(model)
    check_options(**settings)
    device, recipe, factory = device_of(model), *_resolve(objective, attack, eps)
    perturb = bind(factory, model)
    total = max(1, round(epochs * batches))
    steps = math.ceil(total / accumulate)
    settings |= {
        "objective": name_of(objective),
        "attack": describe(factory, model),
        "steps": steps,
        "device": str(device),
    }
    history: list[Epoch] = []
    with (
        preserved_flags(model),
        preserved_rng(model, seed),
        torch.enable_grad(),
        in_channels_last(model, channels_last),
        _unmarked(model),
    ):
        _training_mode(model)
        optimiser = _optimizer(model, optimizer, lr=lr, weight_decay=weight_decay, momentum=momentum)
        update = _Update(model, optimiser, recipe.objective, perturb, clip_norm=clip_norm, precision=precision)
        scheduler = _scheduler(optimiser, schedule, lr=lr, steps=steps, warmup=warmup)
        stream = _repeat(update.shard(train_data), total)
        done = 0
        with tqdm(
            total=total, desc="fine-tuning", unit="batch", disable=None if progress else True, leave=False
        ) as bar:
            for step, group in enumerate(iter(lambda: list(islice(stream, accumulate)), [])):
                scheduler.step_update(step)
                for size, loss in update(group):
                    epoch, done = done // batches + 1, done + 1
                    if not math.isfinite(loss):
                        raise DivergenceError(
                            f"the loss became {loss} in batch {done} of {total} (epoch {epoch}); "
                            f"lower lr (now {lr:g}) or set clip_norm"
                        )
                    _record(history, Epoch(epoch, size, loss, optimiser.param_groups[0]["lr"]))
                bar.set_postfix(epoch=epoch, loss=f"{history[-1].loss:.3f}", refresh=False)
                bar.update(len(group))
    return Finetuning(settings, tuple(history))


def check_training(model: nn.Module, train_data: Iterable[Any], **training: Any) -> None:
    """Raise the `InputError` that `finetune(model, train_data, **training)` would raise before it trains."""
    try:
        call = inspect.signature(finetune).bind(model, train_data, **training)
    except TypeError as error:
        known = ", ".join(inspect.signature(finetune).parameters)
        raise InputError(f"training arguments: {error}; finetune takes {known}") from error
    call.apply_defaults()
    given = call.arguments
    _check_length(train_data)
    _check_trainable(model)
    check_options(**{name: given[name] for name in inspect.signature(check_options).parameters})
    _, factory = _resolve(given["objective"], given["attack"], given["eps"])
    bind(factory, model)


class _Update:
    """One optimiser step on one batch, through accelerate."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        perturb: Perturb,
        *,
        clip_norm: float | None,
        precision: Precision,
    ) -> None:
        self.accelerator = Accelerator(device_placement=False)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.objective, self.perturb = objective, perturb
        self.clip_norm, self.precision = clip_norm, precision
        self.num_classes: int | None = None

    def shard(self, data: Iterable[Any]) -> Iterable[Any]:
        """This process's part of the data."""
        if self.accelerator.num_processes == 1 or not isinstance(data, DataLoader):
            return data
        return self.accelerator.prepare_data_loader(data)

    def __call__(self, batches: list[tuple[Any, Any]]) -> list[tuple[int, float]]:
        """The size and the loss of each of the batches, whose gradients are averaged over all their images."""
        checked = [self._check(*batch) for batch in batches]
        total = sum(len(images) for images, _ in checked)
        self.optimizer.zero_grad()
        losses = []
        for number, (images, labels) in enumerate(checked, start=1):
            with nullcontext() if number == len(checked) else self.accelerator.no_sync(self.model):
                loss = self._loss(images, labels)
                self.accelerator.backward(loss * (len(images) / total))
            losses.append((len(images), loss.detach()))
        if self.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return [(size, float(loss)) for size, loss in losses]

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with autocast(images.device, self.precision):
            return check_loss(self.objective(self.model, images, labels, self.perturb))

    def _check(self, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """The batch on the model's device, fit for it."""
        images, labels = check_batch(images, labels)
        model = self.accelerator.unwrap_model(self.model)
        images, labels = images.to(device_of(model)), labels.to(device_of(model))
        if self.num_classes is None:
            self.num_classes = num_classes(model, images)
        return check_batch(images, labels, num_classes=self.num_classes)


def check_options(
    *,
    epochs: float = 1,
    lr: float = 0.05,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    warmup: float = 0.1,
    clip_norm: float | None = None,
    accumulate: int = 1,
    precision: str = "fp32",
    channels_last: bool = False,
    seed: int = 0,
) -> None:
    """Raise `InputError` unless these arguments of `finetune` are usable."""
    check_number("epochs", epochs, low=0, open_low=True)
    check_number("lr", lr, low=0, high=10, open_low=True)
    check_number("momentum", momentum, low=0, high=1)
    check_number("weight_decay", weight_decay, low=0)
    check_number("warmup", warmup, low=0, high=1)
    if clip_norm is not None:
        check_number("clip_norm", clip_norm, low=0, open_low=True)
    check_count("accumulate", accumulate)
    check_choice("schedule", schedule, ("cosine", "constant"))
    check_precision(precision)
    check_choice("optimizer", optimizer, list_optimizers())
    check_count("seed", seed, low=0)


def _check_trainable(model: nn.Module) -> None:
    device_of(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("model: none of its parameters requires a gradient; call model.requires_grad_(True)")


def _check_length(train_data: Iterable[Any]) -> int:
    """The number of batches in an epoch."""
    if not isinstance(train_data, Sized) or isinstance(train_data, Iterator):
        raise InputError("train_data: expected a DataLoader or a list of (images, labels) batches, which has a len()")
    check_count("len(train_data)", len(train_data))
    return len(train_data)


def _resolve(
    objective: str | Objective, attack: str | AttackLike | None, eps: float | str
) -> tuple[Recipe, AttackLike]:
    """The objective, and the attack to use: the one given, or else the objective's own."""
    recipe, size = resolve(objective), parse_eps(eps)
    if attack is None or isinstance(attack, str):
        return recipe, named_attack(attack or recipe.attack, eps=size)
    return recipe, attack


def _optimizer(model: nn.Module, name: str, **arguments: float) -> torch.optim.Optimizer:
    """Timm's optimiser of that name."""
    try:
        return create_optimizer_v2(model, opt=name, **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer: timm cannot make {name!r} with {arguments}: {error}") from error


def _scheduler(optimizer: torch.optim.Optimizer, name: str, *, lr: float, steps: int, warmup: float) -> Any:
    """Timm's schedule, counted in batches."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine" if name == "cosine" else "multistep",
        decay_milestones=(),
        num_epochs=steps,
        warmup_epochs=round(warmup * steps),
        warmup_lr=lr / 100,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler


@contextmanager
def _unmarked(model: nn.Module) -> Iterator[None]:
    """Take off what accelerate notes on the model, that it has prepared it."""
    attributes = set(vars(model))
    try:
        yield
    finally:
        for name in set(vars(model)) - attributes:
            delattr(model, name)


def _training_mode(model: nn.Module) -> None:
    """Training mode, but for norm layers whose parameters are all frozen."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm and parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _repeat(data: Iterable[Any], steps: int) -> Iterator[Any]:
    """The first `steps` batches of endless passes over `data`."""
    done = 0
    while done < steps:
        before = done
        for batch in pairs(data):
            yield batch
            done += 1
            if done == steps:
                return
        if done == before:
            raise InputError("train_data: it yielded no batch")


def _record(history: list[Epoch], batch: Epoch) -> None:
    """Add a batch to the running mean of its epoch."""
    if not history or history[-1].epoch != batch.epoch:
        history.append(batch)
        return
    last = history[-1]
    images = last.images + batch.images
    loss = (last.loss * last.images + batch.loss * batch.images) / images
    history[-1] = Epoch(batch.epoch, images, loss, batch.learning_rate)
