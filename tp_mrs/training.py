"""A training run as it goes on: everything that changes, and that a checkpoint keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from time import perf_counter
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .batches import numbered
from .errors import DivergenceError, InputError, device_of, naming
from .passes import Passes
from .processes import failing_together, gather, place
from .randomness import generator_states, generators, random_state, set_generator_states, set_random_state
from .storage import copy_tensors, put_tensors, tensors_of
from .updates import Update, load_optimizer
from .validation import Validation


@dataclass(frozen=True)
class Epoch:
    """What one pass over the data, or the last part of one, came to.

    Attributes:
        epoch: its number, from 1.
        images: trained on, by all processes together.
        loss: mean over these images, in nats for cross-entropy.
        learning_rate: of the last update.
        clean, robust: accuracy on the validation data at its end, plain and attacked; None without such data.
        seconds: that it took, validation included; counts for nothing when epochs are compared.
    """

    epoch: int
    images: int
    loss: float
    learning_rate: float
    clean: float | None = None
    robust: float | None = None
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Best:
    """The epoch with the best robust accuracy so far, and the tensors that the model had then."""

    epoch: int
    robust: float
    tensors: dict[str, Tensor]


class Training:
    """A run: `while not finished: advance()`, then `finish()`.

    Args:
        model: to be trained, in training mode.
        update: one step.
        scheduler: timm's, counted in updates.
        passes: over the training data.
        total: batches of this process, in the whole run.
        accumulate: batches an update.
        validation: to measure after each epoch.
        patience: epochs without improvement after which to stop.
        average: of the weights, if there is to be one.
    """

    def __init__(
        self,
        model: nn.Module,
        update: Update,
        scheduler: Any,
        passes: Passes,
        *,
        total: int,
        accumulate: int,
        validation: Validation | None,
        patience: int | None,
        average: ModelEmaV3 | None,
    ) -> None:
        self.model, self.update, self.scheduler, self.passes = model, update, scheduler, passes
        self.total, self.accumulate = total, accumulate
        self.validation, self.patience = validation, patience
        self.average = average
        self.generators = generators(passes.data, None if validation is None else validation.data)
        self.done, self.history = 0, list[Epoch]()
        self.best: Best | None = None
        self._finite = [name for name, tensor in tensors_of(model).items() if bool(torch.isfinite(tensor).all())]

    @property
    def step(self) -> int:
        """Updates made."""
        return math.ceil(self.done / self.accumulate)

    @property
    def ended(self) -> list[Epoch]:
        """The epochs that are over."""
        return [epoch for epoch in self.history if min(epoch.epoch * self.passes.batches, self.total) <= self.done]

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do, or nothing to be hoped for."""
        if self.best is not None and self.patience is not None and len(self.ended) - self.best.epoch >= self.patience:
            return True
        return self.done >= self.total

    def advance(self) -> list[Epoch]:
        """Make one update; the epochs that it brought to an end.

        Raises:
            InputError: a batch is unusable, here or in another process.
            DivergenceError: the loss, or a weight at the end of an epoch, is not finite.
        """
        begun, before = perf_counter(), len(self.ended)
        with failing_together(), naming("train_data"):
            count = min(self.accumulate, self.total - self.done)
            batches = [self._checked(*batch) for batch in islice(self.passes, count)]
        self.scheduler.step_update(self.step)
        for size, loss in self.update(batches):
            self._record(size, loss)
        if self.average is not None:
            self.average.update(self.model)
        ended = len(self.ended) > before
        if ended:
            self.check_weights()
            self._validate(before)
        self.history[-1] = replace(self.history[-1], seconds=self.history[-1].seconds + perf_counter() - begun)
        return self.ended[before:]

    def _checked(self, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """The batch that the pass has come to, fit for the model."""
        with numbered(self.passes.taken - 1):
            return self.update.check(images, labels)

    def check_weights(self) -> None:
        """Raise `DivergenceError` unless all is finite that was finite at the beginning."""
        tensors = tensors_of(self.model)
        for name in self._finite:
            if not bool(torch.isfinite(tensors[name]).all()):
                raise self._diverged(f"{name} stopped being finite by batch {self.done} of {self.total}")

    def finish(self) -> None:
        """Give the model its final weights: those of the best epoch, or their moving average, or the last ones."""
        if self.best is not None:
            put_tensors(self.model, self.best.tensors)
        elif self.average is not None:
            put_tensors(self.model, tensors_of(self.average.module))

    def state(self, *, complete: bool = False) -> dict[str, Any]:
        """What `restore` needs, or `result` if the run is complete; all processes must ask for it."""
        state = {
            "complete": complete,
            "history": [asdict(epoch) for epoch in self.history],
            "model": tensors_of(self.model),
            "generators": generator_states(self.generators),
        }
        if complete:
            return state
        optimizer = self.update.optimizer.state_dict()
        return {
            **state,
            "done": self.done,
            "pass": {"number": self.passes.number, "taken": self.passes.taken, "start": self.passes.start},
            "random": gather(random_state(device_of(self.model))),
            "optimizer": {**optimizer, "state": {str(index): each for index, each in optimizer["state"].items()}},
            "average": None if self.average is None else tensors_of(self.average.module),
            "best": None if self.best is None else vars(self.best),
        }

    def restore(self, state: Any) -> None:
        """Go on from a state of the same run; batches of the epoch that have been seen are read again and dropped."""
        put_tensors(self.model, state["model"])
        self.history, self.done = epochs_of(state), state["done"]
        load_optimizer(self.update.optimizer, state["optimizer"])
        if self.average is not None:
            put_tensors(self.average.module, state["average"])
        if state["best"] is not None:
            tensors = {
                name: tensor.to(device_of(self.model)).clone() for name, tensor in state["best"]["tensors"].items()
            }
            self.best = Best(**{**state["best"], "tensors": tensors})
        with failing_together():
            self.passes.seek(**state["pass"])
        set_random_state(state["random"][place()[0]], device_of(self.model))
        set_generator_states(self.generators, state["generators"])

    def _record(self, images: int, loss: float) -> None:
        """Add a batch to the running mean of its epoch."""
        number, self.done = self.done // self.passes.batches + 1, self.done + 1
        rate = self.update.optimizer.param_groups[0]["lr"]
        if not math.isfinite(loss):
            raise self._diverged(f"the loss became {loss} in batch {self.done} of {self.total} (epoch {number})")
        if not self.history or self.history[-1].epoch != number:
            self.history.append(Epoch(number, images, loss, rate))
            return
        last = self.history[-1]
        mean = (last.loss * last.images + loss * images) / (last.images + images)
        self.history[-1] = replace(last, images=last.images + images, loss=mean, learning_rate=rate)

    def _diverged(self, what: str) -> DivergenceError:
        rate, limit = self.update.optimizer.param_groups[0]["lr"], self.update.clip_norm
        return DivergenceError(f"{what}; lower lr (now {rate:g}) or {'set ' if limit is None else ''}clip_norm")

    def _validate(self, before: int) -> None:
        """Note the accuracy for the epochs that ended since `before`, and the weights if they are the best so far."""
        if self.validation is None:
            return
        with self._averaged():
            clean, robust = self.validation()
            if self.best is None or robust > self.best.robust:
                self.best = Best(len(self.ended), robust, copy_tensors(self.model))
        for index in range(before, len(self.ended)):
            self.history[index] = replace(self.history[index], clean=clean, robust=robust)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model has the moving average of its weights inside, if there is one."""
        if self.average is None:
            yield
            return
        own = copy_tensors(self.model)
        put_tensors(self.model, tensors_of(self.average.module))
        try:
            yield
        finally:
            put_tensors(self.model, own)


def epochs_of(state: Any) -> list[Epoch]:
    """The history in a state."""
    return [Epoch(**epoch) for epoch in state["history"]]


def moving_average(model: nn.Module, decay: float) -> ModelEmaV3:
    """Timm's moving average of the weights and buffers, which begins with those of now."""
    try:
        return ModelEmaV3(model, decay=decay)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"ema: the model cannot be copied, so its weights cannot be averaged: {error}") from error
