"""One update of the weights: an optimiser, a schedule, and a step by all processes together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from .attacks import Perturb
from .batches import num_classes
from .borrowing import borrowed
from .errors import InputError, check_batch, device_of
from .numerics import Precision, autocast
from .objectives import Objective, loss_of
from .processes import add_up, gather, place, share


class Update:
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
        self._attacked: tuple[Tensor, Tensor] | None = None

    def __call__(self, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[int, float]]:
        """The number of images and their mean loss in each of the batches, over all processes.

        Gradients are averaged over all images of all batches and processes. The buffers, such as BatchNorm's running
        statistics, are the first process's afterwards. If a loss is not finite, weights and buffers stay as they are.
        """
        sizes = [sum(each) for each in zip(*gather([len(images) for images, _ in batches]), strict=True)]
        count, total = place()[1], sum(sizes)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self.optimizer.zero_grad()
        losses = []
        for number, (images, labels) in enumerate(batches, start=1):
            with nullcontext() if number == len(batches) else self.accelerator.no_sync(self.model):
                loss = self._loss(images, labels)
                self.accelerator.backward(loss * (len(images) * count / total))
            losses.append(len(images) * loss.detach().double())
        self._check_all_used()
        means = [loss / size for size, loss in zip(sizes, add_up(torch.stack(losses)).tolist(), strict=True)]
        if not all(map(math.isfinite, means)):
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            return list(zip(sizes, means, strict=True))
        if self.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        share(self.model.buffers())
        return list(zip(sizes, means, strict=True))

    def robust_accuracy(self) -> float | None:
        """Of the model as it is now, in eval mode, on this process's last attacked images; None if none were."""
        if self._attacked is None:
            return None
        model, (images, labels) = self.accelerator.unwrap_model(self.model), self._attacked
        with borrowed(model), torch.no_grad(), autocast(images.device, self.precision):
            return float((model(images).argmax(dim=1) == labels).float().mean())

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        def recorded(clean: Tensor, targets: Tensor) -> Tensor:
            attacked = self.perturb(clean, targets)
            self._attacked = (attacked, labels) if len(attacked) == len(labels) else None
            return attacked

        with autocast(images.device, self.precision):
            return loss_of(self.objective, self.model, images, labels, recorded)

    def _check_all_used(self) -> None:
        """Raise `InputError` if several processes train what the loss does not depend on: they would go apart."""
        model = self.accelerator.unwrap_model(self.model)
        idle = (name for name, each in model.named_parameters() if each.requires_grad and each.grad is None)
        name = next(idle, None) if place()[1] > 1 else None
        if name is not None:
            raise InputError(
                f"model: the loss does not depend on {name}, so that several processes cannot train it together; "
                f"freeze it with model.get_parameter({name!r}).requires_grad_(False), or use one process"
            )

    def check(self, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """The batch on the model's device, fit for it."""
        images, labels = check_batch(images, labels)
        model = self.accelerator.unwrap_model(self.model)
        images, labels = images.to(device_of(model)), labels.to(device_of(model))
        if self.num_classes is None:
            self.num_classes = num_classes(model, images)
        return check_batch(images, labels, num_classes=self.num_classes)


def make_optimizer(model: nn.Module, name: str, **arguments: float) -> torch.optim.Optimizer:
    """Timm's optimiser of that name."""
    try:
        return create_optimizer_v2(model, opt=name, **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer: timm cannot make {name!r} with {arguments}: {error}") from error


def make_scheduler(optimizer: torch.optim.Optimizer, name: str, *, lr: float, steps: int, warmup: float) -> Any:
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


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Let an optimiser go on from its `state_dict()` as JSON left it, each tensor in the layout of its parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        int(index): {key: _like(parameters[int(index)], value) for key, value in entries.items()}
        for index, entries in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _like(parameter: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.dim() == 0:
        return value.clone() if isinstance(value, Tensor) else value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


@contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Take off what accelerate notes on the model, that it has prepared it."""
    attributes = set(vars(model))
    try:
        yield
    finally:
        for name in set(vars(model)) - attributes:
            delattr(model, name)


def training_mode(model: nn.Module) -> None:
    """Training mode, but for norm layers whose parameters are all frozen."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm and parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
