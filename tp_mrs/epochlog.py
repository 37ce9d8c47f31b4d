"""A log of epochs: JSON, one line each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError, check_path
from .files import check_output_folder
from .processes import failing_together, place
from .training import Epoch


class EpochLog:
    """A file to which a run adds its lines, by the first process; those of other runs stay.

    A run that goes on after a crash finds its earlier lines by what they say, in a copy of the file, too.

    Args:
        path: the file; None to keep no log.

    Raises:
        InputError: the file cannot be read, or its folder not be written.
    """

    def __init__(self, path: str | Path | None) -> None:
        target = None if path is None else check_path("log", path).resolve()
        self.path = target if place()[0] == 0 else None
        with failing_together():
            if self.path is not None:
                check_output_folder(self.path.parent, name="log")
                self._content()

    def update(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add the lines of this run's records that are not there: none lost, none twice, none torn by a crash."""
        with failing_together():
            if self.path is None:
                return
            *lines, torn = self._content().split(b"\n")
            missing = b"".join(line + b"\n" for line in map(_line, records) if line not in lines)
            if missing:
                _append(self.path, missing[len(torn) :] if missing.startswith(torn) else b"\n" + missing)

    def _content(self) -> bytes:
        try:
            if self.path is None or not self.path.exists():
                return b""
            if not self.path.is_file():  # a device may have no end
                raise InputError(f"log: {self.path} is a folder or a device; choose another file")
            return self.path.read_bytes()
        except OSError as error:
            raise InputError(f"log: cannot read {self.path} ({error.strerror}); choose another file") from error


def read_epochs(path: str | Path) -> tuple[Epoch, ...]:
    """The epochs of the last run in a log.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        epochs = [Epoch(**json.loads(line)) for line in lines]
    except OSError as error:
        raise InputError(f"path: cannot read {path} ({error.strerror})") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"path: {path} is no log of epochs ({error})") from error
    last = max((index for index, epoch in enumerate(epochs) if epoch.epoch == 1), default=0)
    return tuple(epochs[last:])


def _append(path: Path, lines: bytes) -> None:
    try:
        with path.open("ab") as file:
            file.write(lines)
    except OSError as error:
        raise InputError(f"log: cannot write {path} ({error.strerror}); choose a writable file") from error


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode()
