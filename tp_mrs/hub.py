"""Models on the Hugging Face hub, as timm names them: `hf-hub:owner/name`, or `hf-hub:owner/name@revision`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import InputError, check_path

HUB, FOLDER = "hf-hub:", "local-dir:"
WEIGHTS, CONFIG = "model.safetensors", "config.json"

FAILURES: tuple[type[Exception], ...] = (OSError, HFValidationError, *HfHubHTTPError.__bases__)
"""What downloading raises; the last are of whichever library it connects by."""

_REASONS: dict[type[Exception], str] = {  # the first that fits
    LocalEntryNotFoundError: "it was not downloaded before, and the hub can't be reached; check the connection",
    RevisionNotFoundError: "there is no such revision",
    RepositoryNotFoundError: "there is no such model, or it is private: hf auth login",
    EntryNotFoundError: "there is no such file",
}


def on_hub(path: object) -> bool:
    """Whether it names a model on the hub, and no path."""
    return isinstance(path, str) and path.startswith(HUB)


def weights_file(path: str | Path) -> Path:
    """The file that holds the weights: of a model on the hub, downloaded; of a folder; else `path` itself.

    Raises:
        InputError: it is no path, or can't be downloaded.
    """
    if on_hub(path):
        return download(str(path), WEIGHTS)
    file = check_path("path", path)
    return file / WEIGHTS if file.is_dir() else file


def download(name: str, file: str) -> Path:
    """One file of a model on the hub, in the hub's own cache.

    Raises:
        InputError: the hub can't be reached, or has no such model, revision or file.
    """
    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision or None))
    except FAILURES as error:
        raise InputError(f"path: {not_downloaded(f'{file} of {name}', error)}") from error


def not_downloaded(what: str, error: Exception) -> str:
    """Why downloading failed, in a sentence."""
    known = (reason for kind, reason in _REASONS.items() if isinstance(error, kind))
    return f"cannot download {what} ({next(known, ' '.join(str(error).split())[:200])})"


def timm_config(name: str) -> dict[str, Any]:
    """What `config.json` says of a model on the hub, or in a folder (`local-dir:path`): its timm architecture, ….

    Raises:
        InputError: there is none, or it names no architecture.
    """
    file = download(name, CONFIG) if on_hub(name) else Path(name.removeprefix(FOLDER)) / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"path: cannot read {file} ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"path: {file} is not valid JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise InputError(f"path: {CONFIG} of {name} names no architecture of timm's")
    return config
