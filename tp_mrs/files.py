"""Write whole files or none, and read the project's JSON."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import InputError, check_path


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write `content` under a temporary name beside `path`, then rename it.

    Raises:
        InputError: the folder does not exist or cannot be written; an existing file stays as it was.
    """
    target = check_path("path", path)
    part: str | None = None
    try:
        descriptor, part = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, target)
    except OSError as error:
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)
        raise InputError(f"path: cannot write {target} ({error.strerror}); choose a writable folder") from error
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, content: dict[str, Any]) -> Path:
    """Write `content` as indented JSON, whole or not at all."""
    return write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | Path, format: str) -> dict[str, Any]:
    """Read a JSON object whose `"format"` is `format`.

    Raises:
        InputError: the file cannot be read, is no JSON object, or holds something else.
    """
    try:
        content = json.loads(check_path("path", path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"path: cannot read {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"path: {path} is not valid JSON ({error})") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != format:
        raise InputError(
            f"path: expected {path} to hold {format!r}, found {found!r}; give a file of that kind, and make one of "
            "another version anew"
        )
    return dict(content)


def remove_leftovers(path: str | Path) -> None:
    """Remove what `write_bytes(path, …)` left beside it when it was killed, an hour ago or more."""
    target = Path(path)
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()


def check_output_folder(path: str | Path, *, name: str = "out", files: Iterable[str] = ()) -> Path:
    """Create the folder `path` if need be and make sure that `files` can be written in it; `name` is the argument's."""
    folder = check_path(name, path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{name}: cannot write to {folder} ({error.strerror}); choose a writable folder") from error
    for file in files:
        if (folder / file).is_dir():
            raise InputError(
                f"{name}: cannot write {folder / file}, it is a folder; remove it, or choose another place"
            )
    return folder
