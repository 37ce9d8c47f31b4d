"""A log of epochs: JSON, one line each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import check_output_folder, write_bytes
from .processes import failing_together, place
from .training import Epoch


class EpochLog:
    """A file to which a run adds its lines, by the first process; those of other runs before stay.

    Args:
        path: the file; None to keep no log.
        origin: `origin` of the same run before it was interrupted, None for a new run.

    Raises:
        InputError: the file cannot be read, or its folder not be written.
    """

    def __init__(self, path: str | Path | None, origin: Mapping[str, Any] | None = None) -> None:
        self.path = None if path is None or place()[0] > 0 else Path(path).expanduser().resolve()
        self._start = 0
        with failing_together():
            if self.path is not None:
                check_output_folder(self.path.parent, name="log")
                size = len(self._content())
                known = origin is not None and origin["path"] == str(self.path)
                self._start = min(origin["start"], size) if origin is not None and known else size

    @property
    def origin(self) -> dict[str, Any] | None:
        """The file, and the number of bytes in it before this run's lines."""
        return None if self.path is None else {"path": str(self.path), "start": self._start}

    def update(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Make these records this run's lines: none lost, none twice, none torn, whatever happened before."""
        with failing_together():
            if self.path is None:
                return
            content = self._content()
            earlier = content[: self._start]
            end = b"\n" if records and earlier and not earlier.endswith(b"\n") else b""
            wanted = earlier + end + b"".join(map(_line, records))
            if not wanted.startswith(content):
                write_bytes(self.path, wanted)
            elif wanted != content:
                _append(self.path, wanted[len(content) :])

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes() if self.path is not None and self.path.exists() else b""
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
    return (json.dumps(record, allow_nan=False) + "\n").encode()
