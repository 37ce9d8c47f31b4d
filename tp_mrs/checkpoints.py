"""The state of a run in one file, from which it goes on after a crash as if nothing had happened."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import tensorfile
from .errors import InputError, check_path
from .files import check_output_folder, remove_leftovers
from .processes import failing_together, gather, place
from .storage import checksum, tensors_of

FORMAT = "tp_mrs.checkpoint/1"
_TYPE_NAMES = {kind: name for name, kind in tensorfile.TYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors file that belongs to one run, told by its settings and the model that it began with.

    All processes read it, the first one writes it, so it must lie on a file system that all of them see.
    """

    path: Path
    run: Mapping[str, Any]

    @classmethod
    def of(cls, path: str | Path, model: nn.Module, settings: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint of a run with these settings, JSON to be, that begins with `model` as it is.

        Raises:
            InputError: the file's folder cannot be written, or the model holds what a file cannot.
        """
        target = check_path("checkpoint", path)
        if target.is_dir():
            raise InputError(f"checkpoint: {target} is a folder, expected a file such as training.safetensors")
        with failing_together():
            check_output_folder(target.parent, name="checkpoint")
            text = json.dumps({**settings, **beginning(model)})
            run = json.loads(re.sub(" at 0x[0-9a-f]+", "", text))  # addresses in names of functions and objects
            if place()[0] == 0:
                remove_leftovers(target)
        return cls(target, run)

    def read(self) -> Any:
        """The state that was written last, None if none was.

        Raises:
            InputError: the file is damaged, of another run, or no checkpoint.
        """
        if not gather(self.path.exists())[0]:
            return None
        with failing_together():
            try:
                metadata, tensors = tensorfile.read(self.path, format=FORMAT)
                if metadata is None:
                    raise InputError("it is no checkpoint")
                there, state = metadata["run"], metadata["state"]
            except (InputError, KeyError) as error:
                raise InputError(
                    f"checkpoint: {self.path} is unusable ({error}); choose another path, or delete it to start anew"
                ) from error
            check_same_run(self.path, there, self.run)
        return _unpacked(state, tensors)

    def write(self, state: Any) -> None:
        """Replace the file, whole or not at all, by this state: tensors in dictionaries, lists and plain values.

        Raises:
            InputError: it cannot be written; what was written before is still there.
        """
        with failing_together():
            if place()[0] == 0:
                tensors: dict[str, Tensor] = {}
                packed = _packed(state, "state", tensors)
                try:
                    tensorfile.write(self.path, {"run": self.run, "state": packed}, tensors, format=FORMAT)
                except InputError as error:
                    raise InputError(
                        f"checkpoint: {str(error).removeprefix('path: ')}; the one written before, if any, is intact: "
                        "start again to go on from it"
                    ) from error


def beginning(model: nn.Module) -> dict[str, Any]:
    """The shapes and a checksum of all parameters and buffers, JSON to be."""
    tensors = tensors_of(model)
    shapes = {f"the shape of {name}": list(tensor.shape) for name, tensor in sorted(tensors.items())}
    return {**shapes, "the checksum of the initial weights": checksum(tensors)}


def check_same_run(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise `InputError`, with the first difference, if a file tells of another run than the one to be started."""
    for name in {**here, **there}:
        texts = [repr(run[name]) if name in run else "missing" for run in (there, here)]
        if texts[0] != texts[1]:
            alike = next((at for at, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), 0)
            skipped = max(alike - 30, 0)
            found, expected = (f"{'…' if skipped else ''}{text[skipped : skipped + 80]}" for text in texts)
            raise InputError(
                f"checkpoint: {path} is of another run: {name} is {found} there, {expected} here; choose another path, "
                "or delete it to start anew"
            )


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON can hold it, with each tensor moved to `tensors`, under a name that says where it was.

    A dictionary with a single key stands for what JSON has not: a tensor, a tuple, a type of numbers.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": _TYPE_NAMES[value]}
    if isinstance(value, Mapping):
        return {key: _packed(each, f"{name}.{key}", tensors) for key, each in value.items()}
    if isinstance(value, list | tuple):
        parts = [_packed(each, f"{name}.{index}", tensors) for index, each in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    return value


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    match value:
        case {"tensor": str(name), **others} if not others:
            return tensors[name]
        case {"dtype": str(name), **others} if not others:
            return tensorfile.TYPES[name]
        case {"tuple": list(parts), **others} if not others:
            return tuple(_unpacked(each, tensors) for each in parts)
        case dict():
            return {key: _unpacked(each, tensors) for key, each in value.items()}
        case list():
            return [_unpacked(each, tensors) for each in value]
    return value
