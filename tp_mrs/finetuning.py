"""Adversarial fine-tuning with any objective, on accelerate."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.optim import list_optimizers
from torch import nn
from tqdm.auto import tqdm

from .attacks import AttackLike, Perturb, bind, describe, named_attack, parse_eps
from .batches import checked_batches, extent
from .borrowing import borrowed, preserved_flags, preserved_rng
from .checkpoints import Checkpoint
from .epochlog import EpochLog
from .errors import (
    DivergenceError,
    InputError,
    check_choice,
    check_count,
    check_flag,
    check_full_precision,
    check_number,
    check_path,
    check_seed,
    device_of,
    naming,
)
from .numerics import Precision, autocast, check_precision, in_channels_last
from .objectives import Objective, Recipe, name_of, resolve, try_out
from .passes import Passes, epoch_length
from .processes import failing_together, join, place
from .randomness import generators, preserved_generators, set_generator_states
from .storage import put_tensors
from .training import Epoch, Training, epochs_of, moving_average
from .updates import Update, make_optimizer, make_scheduler, training_mode, unmarked
from .validation import Validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finetuning:
    """The record of a fine-tuning run: settings and, per epoch, mean training loss and accuracy, if measured."""

    settings: dict[str, Any]
    history: tuple[Epoch, ...]

    @property
    def images(self) -> int:
        """Training images seen, each as often as it came."""
        return sum(epoch.images for epoch in self.history)

    @property
    def best(self) -> Epoch | None:
        """The first of the epochs with the best robust accuracy, whose weights the model has; None if not measured."""
        measured = [epoch for epoch in self.history if epoch.robust is not None]
        return max(measured, key=lambda epoch: epoch.robust or 0.0, default=None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Finetuning:
        """What `to_dict` gave."""
        return cls(content["settings"], tuple(epochs_of(content)))


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
    ema: float | None = None,
    validation_data: Iterable[Any] | None = None,
    validation_attack: str | AttackLike = "pgd-10",
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    log: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Finetuning:
    """Train `model` in place against attacks.

    Weights and buffers change; training flags, `requires_grad`, `.grad` and random state are as before afterwards.
    Parameters with `requires_grad=False` stay as they are, and a BatchNorm with only such parameters keeps its
    running statistics.

    With `checkpoint`, a run that was interrupted at whatever moment goes on where it was when called again with the
    same arguments and the same initial model, and a finished one is not repeated. On a CPU, with as many threads, the
    final weights are those of an undisturbed run, bit for bit, as long as all that is random is drawn from the
    generators of Python, NumPy and torch and those of the `DataLoader`. The batches of the current epoch that have been
    seen are read again and dropped. This holds with workers, too, unless they are persistent: then the order of the
    images is the same, but not what the workers draw at random. Objectives that are functions are told apart by their
    names alone, and should keep no state; each is tried on two images before training begins.

    Under `torchrun`, an epoch is one pass over the data by all processes together: each takes its part of the batches,
    so that N of them have N batches in each update. If N doesn't divide their number, the first batches come again to
    fill up the last round (as in `DistributedSampler`). Gradients are averaged over the images of all processes.
    BatchNorm normalises by each process's own images, and its running statistics are the first process's; for those
    of all images pass `torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)`. The first process writes the files.

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
        optimizer: a name from `timm.optim.list_optimizers()`, but not `"adahessian"`; `"sgd"` is Nesterov's there.
        momentum: of optimisers that have one.
        weight_decay: not applied to biases and norms (timm's rule).
        schedule: `"cosine"` to 0, or `"constant"`; stepped every update.
        warmup: fraction of the run over which the learning rate rises linearly.
        clip_norm: largest L2 norm of the gradient; None for no limit.
        accumulate: batches whose gradients add up to one update, as if they were one batch (but for BatchNorm).
        precision: `"bf16"` runs attack and update under autocast.
        channels_last: train in that memory layout; often faster for convolutions.
        ema: decay of an exponential moving average of weights and buffers (timm's `ModelEmaV3`), in [0, 1]: after each
            update it becomes `ema · average + (1 − ema) · weights`. It is validated, and the model ends with it.
        validation_data: held out from the training split, like `train_data`. After each epoch the accuracy on it is
            measured in eval mode, clean and under attack, without influence on the training, and the model ends with
            the weights of the epoch with the best robust accuracy (Rice et al., 2020, arXiv 2002.11569: robust accuracy
            falls again in long training).
        validation_attack: for that; a name (of size `eps`), a torchattacks attack on `model`, or a factory.
        patience: stop after so many epochs without a better robust accuracy; None to go on to the end.
        checkpoint: a safetensors file to keep the state of the run in, written whole or not at all. Delete it when you
            have saved the result.
        checkpoint_every: updates between two checkpoints; there is one after each epoch anyway.
        log: a file to which a line of JSON is added after each epoch, the fields of `Epoch`. After a crash the lines
            are as if nothing had happened, if there is a checkpoint.
        seed: of attacks' random starts and dropout.
        progress: show a bar on a terminal.

    Raises:
        InputError: an argument or a batch is unusable, or the checkpoint is damaged or of another run; nothing was
            changed if it is an argument. A checkpoint or log cannot be written; the checkpoint before is intact.
        DivergenceError: the loss or a weight stopped being finite. Such a state is never written to the checkpoint.
    """
    given = {name: value for name, value in locals().items() if name not in ("model", "train_data")}
    join()
    plan = _Plan.of(model, train_data, given)
    file = None if checkpoint is None else Checkpoint.of(checkpoint, model, plan.circumstances(model) | plan.settings)
    saved = None if file is None else file.read()
    if saved is None:
        plan.rehearse(model)
    elif saved["complete"]:
        put_tensors(model, saved["model"])
        set_generator_states(generators(train_data, validation_data), saved["generators"])
        plan.journal.update(saved["history"])
        return Finetuning(plan.settings, tuple(epochs_of(saved)))
    with (
        preserved_flags(model),
        preserved_rng(model, seed + 1_000_003 * place()[0]),
        torch.enable_grad(),
        in_channels_last(model, channels_last),
        unmarked(model),
    ):
        training_mode(model)
        training = plan.training(model)
        if saved is not None:
            training.restore(saved)
            logger.info("going on from %s after %d of %d batches", checkpoint, training.done, training.total)
        try:
            _run(training, file, plan.journal, every=checkpoint_every, progress=progress)
        except DivergenceError as error:
            if file is None or not file.path.exists():
                raise
            raise DivergenceError(f"{error}; {file.path} holds the last good state") from error
    return Finetuning(plan.settings, tuple(training.history))


def _run(training: Training, file: Checkpoint | None, journal: EpochLog, *, every: int, progress: bool) -> None:
    """Train to the end. The checkpoint is written before the log, which it can mend."""
    shown = progress and place()[0] == 0
    with tqdm(
        total=training.total,
        initial=training.done,
        desc="fine-tuning",
        unit="batch",
        disable=None if shown else True,
        leave=False,
        mininterval=1,
    ) as bar:
        journal.update([asdict(epoch) for epoch in training.ended])
        while not training.finished:
            before = training.done
            ended = training.advance()
            if training.finished:
                training.finish()
            if file is not None and (ended or training.step % every == 0):
                training.check_weights()
                file.write(training.state(complete=training.finished))
            if ended:
                journal.update([asdict(epoch) for epoch in training.ended])
                if shown and bar.disable:  # there is no terminal
                    told = ", ".join(f"{name} {value}" for name, value in _shown(training).items())
                    logger.info("fine-tuned %d of %d batches: %s", training.done, training.total, told)
            if bar.update(training.done - before):  # it is time to show something
                bar.set_postfix(_shown(training))


def _shown(training: Training) -> dict[str, Any]:
    """What the progress bar says of the last epoch and batch."""
    last, batch = training.history[-1], training.update.robust_accuracy()
    shown = {"epoch": last.epoch, "loss": f"{last.loss:.3f}"}
    if batch is not None:
        shown["batch robust"] = f"{batch:.0%}"
    measured = next((epoch for epoch in reversed(training.history) if epoch.robust is not None), None)
    if measured is not None:
        shown |= {"held-out clean": f"{measured.clean:.1%}", "robust": f"{measured.robust:.1%}"}
    return shown


def check_training(model: nn.Module, train_data: Iterable[Any], **training: Any) -> None:
    """Raise the `InputError` that `finetune(model, train_data, **training)` would raise before it trains."""
    try:
        call = inspect.signature(finetune).bind(model, train_data, **training)
    except TypeError as error:
        known = ", ".join(inspect.signature(finetune).parameters)
        raise InputError(f"training arguments: {error}; finetune takes {known}") from error
    call.apply_defaults()
    given = call.arguments
    join()
    _Plan.of(model, train_data, dict(given)).rehearse(model)


@dataclass(frozen=True)
class _Plan:
    """The arguments of `finetune`, checked."""

    data: Iterable[Any]
    given: dict[str, Any]
    recipe: Recipe
    perturb: Perturb
    validation: Validation | None
    total: int
    settings: dict[str, Any]
    journal: EpochLog

    @classmethod
    def of(cls, model: nn.Module, train_data: Iterable[Any], given: dict[str, Any]) -> _Plan:
        """Raises `InputError` where an argument is unusable; `given` has all but the first two."""
        batches = epoch_length(train_data)
        _check_trainable(model)
        options = {name: given[name] for name in inspect.signature(check_options).parameters}
        check_options(**options)
        recipe, factory = _resolve(given["objective"], given["attack"], given["eps"])
        perturb, validation = bind(factory, model), _validation(model, given)
        total = max(1, round(given["epochs"] * batches))
        del options["checkpoint_every"]  # it changes nothing in the result
        settings = options | {
            "objective": name_of(given["objective"]),
            "attack": describe(factory, model),
            "validation_attack": None if validation is None else repr(validation.attack),
            "steps": math.ceil(total / given["accumulate"]),
            "device": str(device_of(model)),
        }
        journal = _journal(given["log"], given["checkpoint"])
        return cls(train_data, given, recipe, perturb, validation, total, settings, journal)

    def circumstances(self, model: nn.Module) -> dict[str, Any]:
        """What else decides the result, JSON to be, for a checkpoint to compare."""
        held_out = None if self.validation is None else self.validation.data
        parts = {"train_data": self.data} | ({} if held_out is None else {"validation_data": held_out})
        return {
            "the number of processes": place()[1],
            **{f"{what} of {name}": value for name, data in parts.items() for what, value in extent(data).items()},
            "the number of trainable tensors": sum(parameter.requires_grad for parameter in model.parameters()),
        }

    def rehearse(self, model: nn.Module) -> None:
        """Try the objective on two images of the first batch; all is as before afterwards.

        Raises:
            InputError: the batch is unusable, the function is no objective, or its attack can't work on this model.
        """
        with borrowed(model), preserved_generators(self.data):
            with failing_together(), naming("train_data"):
                batches = checked_batches(model, self.data, max_batches=1, description="", progress=False)
                images, labels = next(batches)
            training_mode(model)
            with autocast(images.device, self.given["precision"]):
                try_out(self.recipe.objective, model, images[:2], labels[:2], self.perturb)

    def training(self, model: nn.Module) -> Training:
        """The run, about to begin; `model` is in training mode."""
        given = self.given
        picked = {name: given[name] for name in ("lr", "weight_decay", "momentum")}
        optimizer = make_optimizer(model, given["optimizer"], **picked)
        passes = Passes(self.data, seed=given["seed"], device=device_of(model))
        average = None if given["ema"] is None else moving_average(model, given["ema"])
        return Training(
            model,
            Update(
                model,
                optimizer,
                self.recipe.objective,
                self.perturb,
                clip_norm=given["clip_norm"],
                precision=given["precision"],
            ),
            make_scheduler(
                optimizer, given["schedule"], lr=given["lr"], steps=self.settings["steps"], warmup=given["warmup"]
            ),
            passes,
            total=self.total,
            accumulate=given["accumulate"],
            validation=self.validation,
            patience=given["patience"],
            average=average,
        )


def _validation(model: nn.Module, given: dict[str, Any]) -> Validation | None:
    data, attack = given["validation_data"], given["validation_attack"]
    if data is not None:
        return Validation(model, data, attack, eps=parse_eps(given["eps"]), seed=given["seed"])
    if given["patience"] is not None:
        raise InputError(
            "patience: it needs validation_data (--validation-images), held out from the training split, to tell "
            "improvement by"
        )
    return None


def _journal(log: str | Path | None, checkpoint: str | Path | None) -> EpochLog:
    given = {"checkpoint": checkpoint, "log": log}
    files = [check_path(name, path).resolve() for name, path in given.items() if path is not None]
    if len(set(files)) < len(files):
        raise InputError(f"log: {log} is the checkpoint, too; choose another file")
    return EpochLog(log)


_SECOND_ORDER = ("adahessian",)  # these need the graph of the gradients


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
    ema: float | None = None,
    patience: int | None = None,
    checkpoint_every: int = 500,
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
    if ema is not None:
        check_number("ema", ema, low=0, high=1)
    if patience is not None:
        check_count("patience", patience)
    check_count("accumulate", accumulate)
    check_count("checkpoint_every", checkpoint_every)
    check_choice("schedule", schedule, ("cosine", "constant"))
    check_precision(precision)
    check_flag("channels_last", channels_last)
    check_choice("optimizer", optimizer, [name for name in list_optimizers() if name not in _SECOND_ORDER])
    check_seed(seed)


def _check_trainable(model: nn.Module) -> None:
    device_of(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise InputError("model: none of its parameters requires a gradient; call model.requires_grad_(True)")
    for name, parameter in trained.items():
        check_full_precision(name, parameter)
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"model: {name} holds NaN or infinity, from which no training recovers; load other weights"
            )


def _resolve(
    objective: str | Objective, attack: str | AttackLike | None, eps: float | str
) -> tuple[Recipe, AttackLike]:
    """The objective, and the attack to use: the one given, or else the objective's own."""
    recipe, size = resolve(objective), parse_eps(eps)
    if attack is None or isinstance(attack, str):
        return recipe, named_attack(attack or recipe.attack, eps=size)
    return recipe, attack
