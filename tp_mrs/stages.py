"""Stages of a longer job, each kept in a file with the model that it made, so that none is done twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from .batches import extent
from .checkpoints import Checkpoint
from .errors import InputError, check_path
from .objectives import name_of
from .processes import gather
from .randomness import generator_states, generators, set_generator_states
from .storage import take_shapes, tensors_of, untold_sizes

logger = logging.getLogger(__name__)


class Stages:
    """What a job has done so far; it is the same job if settings and initial model are.

    Args:
        folder: where to keep it; None to keep nothing.
        model: as the job finds it; each stage may change its weights and make it smaller.
        settings: of the job, JSON to be.
        data: whose random generators the stages draw from.
        keeps: dataclasses that stages' results are made of; where they had other fields, it is another job.

    Raises:
        InputError: the folder cannot be written, or holds another job's stages; nothing was changed.
    """

    def __init__(
        self,
        folder: str | Path | None,
        model: nn.Module,
        settings: Mapping[str, Any],
        data: Iterable[Any],
        *,
        keeps: Iterable[type[Any]],
    ) -> None:
        self.folder = None if folder is None else check_path("checkpoint", folder)
        self.model, self.generators = model, generators(*data)
        if self.folder is None:
            return
        if self.folder.is_file():
            raise InputError(f"checkpoint: {self.folder} is a file, expected a folder")
        kept = {f"what {kind.__name__} holds": [each.name for each in fields(kind)] for kind in keeps}
        job = Checkpoint.of(self.folder / "job.safetensors", model, {**settings, **kept})
        if job.read() is None:
            if gather(any(not path.name.startswith(".") for path in self.folder.iterdir()))[0]:
                raise InputError(f"checkpoint: {self.folder} holds other files; choose an empty folder, or a new one")
            job.write({})
        self._job = job.run

    def file(self, name: str) -> Path | None:
        """Where a stage may keep its own state."""
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def do(self, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `stage()` returns, JSON to be; if that is known already, the model becomes what the stage made of it."""
        path = self.file(name)
        if path is None:
            return stage()
        file = Checkpoint(path, self._job)
        saved = file.read()
        if saved is None:
            result: dict[str, Any] = json.loads(json.dumps(stage()))  # as it will be read
            file.write(
                {
                    "result": result,
                    "model": tensors_of(self.model),
                    "sizes": untold_sizes(self.model),
                    "frozen": [key for key, each in self.model.named_parameters() if not each.requires_grad],
                    "generators": generator_states(self.generators),
                }
            )
            return result
        logger.info("%s: done before, read from %s", name, path)
        take_shapes(self.model, saved["model"], saved["sizes"])
        for key, parameter in self.model.named_parameters():
            parameter.requires_grad_(key not in saved["frozen"])
        set_generator_states(self.generators, saved["generators"])
        return dict(saved["result"])


def plainly(value: Any) -> Any:
    """Settings as JSON can hold them: functions and attacks by name, data by its extent, other things by their type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plainly(each) for key, each in value.items()}
    if isinstance(value, list | tuple) and not any(isinstance(each, list | tuple) for each in value):
        return [plainly(each) for each in value]
    if callable(value):
        return name_of(value)
    return extent(value)
