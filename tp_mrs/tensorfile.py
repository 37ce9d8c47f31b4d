"""One safetensors file with our metadata: read without trusting it, written with a checksum."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import InputError, check_path
from .files import write_bytes

FORMAT = "tp_mrs.model/2"
KEY, CHECKSUM = "tp_mrs", "tp_mrs.sha256"
_BLANK = "0" * 64
_LENGTH = 8
"""Bytes at the start of a file that tell how many the header has."""

MOST_METADATA = 4 * 2**20
"""Characters of JSON that we read or write: enough for the class names of ImageNet-21k, little enough to parse."""

MOST_HEADER = 32 * 2**20
"""The same for the whole header, which also lists the tensors."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types that weights can have."""


TYPES = {  # a safetensors file's names for them
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write(
    path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], *, format: str = FORMAT
) -> Path:
    """Write `tensors` and `metadata`, JSON to be, as one file; whole or not at all.

    Raises:
        InputError: the metadata is too long or holds NaN, or the file cannot be written.
    """
    try:
        text = json.dumps({"format": format, **metadata}, allow_nan=False)
    except ValueError as error:
        raise InputError(f"model: its normalisation or arguments cannot be written down ({error})") from error
    if len(text) > MOST_METADATA:
        raise InputError(f"class_names: the metadata takes {len(text)} characters, at most {MOST_METADATA} can be kept")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = _in_order(safetensors.torch.save(plain, {KEY: text, CHECKSUM: _BLANK}))
    return write_bytes(path, content.replace(_entry(_BLANK), _entry(checksum(content)), 1))


def _in_order(content: bytes) -> bytes:
    """The same file with its metadata sorted by key, so that the same tensors give the same bytes."""
    start = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    header = json.loads(content[_LENGTH:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH)  # tensors stay aligned
    return len(text).to_bytes(_LENGTH, "little") + text + content[start:]


def read(path: str | Path, *, format: str = FORMAT) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The metadata of ours that a safetensors file has, None if it has none, and its tensors.

    The tensors are private views of the file, read when they are used; clone what you keep.

    Raises:
        InputError: it cannot be read, is not safetensors, is damaged, or is of another format.
    """
    content, header, start = _open(_regular_file(path), str(path))
    notes = header.pop("__metadata__", {})
    tensors = {name: _view(content, start, name, entry, str(path)) for name, entry in header.items()}
    if KEY not in notes:
        return None, tensors
    metadata = parse(notes[KEY], str(path), MOST_METADATA)
    if metadata.get("format") != format:
        raise InputError(
            f"path: {path} has format {str(metadata.get('format'))[:40]!r}, this version reads {format!r}; "
            "read it with the version of tp_mrs that its metadata names, or a later one"
        )
    written = notes.get(CHECKSUM, "")
    if checksum(content, written) != written:
        raise InputError(f"path: {path} is damaged, its checksum does not match; copy or save it again")
    return metadata, tensors


def parse(text: str, path: str, most: int) -> dict[str, Any]:
    """A JSON object of at most so many characters; no NaN or infinity, no key twice.

    Raises:
        InputError: it is anything else.
    """
    if len(text) > most:
        raise InputError(f"path: the metadata of {path} has {len(text)} characters, at most {most} are read")
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise InputError(f"path: the metadata of {path} is not valid JSON ({str(error)[:100]})") from error
    if not isinstance(content, dict):
        raise InputError(f"path: the metadata of {path} is not a JSON object, but {type(content).__name__}")
    return content


def checksum(content: bytes | mmap.mmap, written: str = "") -> str:
    """SHA-256, in hexadecimal, of a whole file whose own checksum, as `written` in it, counts as zeros."""
    at = content.find(_entry(written)) if written else -1
    digest = hashlib.sha256()
    with memoryview(content) as view:
        if at < 0:
            digest.update(view)
        else:
            digest.update(view[:at])
            digest.update(_entry(_BLANK))
            digest.update(view[at + len(_entry(written)) :])
    return digest.hexdigest()


def _entry(checksum: str) -> bytes:
    return f'"{CHECKSUM}":"{checksum}"'.encode()


def _regular_file(path: str | Path) -> Path:
    file = check_path("path", path)
    if not file.is_file():
        what = "it is a folder" if file.is_dir() else "there is no such file"
        raise InputError(f"path: cannot read {file}, {what}; give a safetensors file, or the folder of a saved model")
    return file


def _open(file: Path, path: str) -> tuple[mmap.mmap, dict[str, Any], int]:
    """The file's content, mapped; its header, which safetensors has found valid; and where its tensors start."""
    try:
        with safe_open(str(file), framework="pt"):
            pass
        with file.open("rb") as opened:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch maps the file too, and fails by RuntimeError
        if _is_pickle(file):
            raise InputError(
                f"path: {file} is a pickle (torch.save), which can run code and is never opened here; where you trust "
                'it, convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), "new.safetensors")'
            ) from error
        raise InputError(
            f"path: cannot read {file} as safetensors ({str(error)[:200]}); write it with tp_mrs.save(model, path)"
        ) from error
    start = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    return content, parse(content[_LENGTH:start].decode(), path, MOST_HEADER), start


def _view(content: mmap.mmap, start: int, name: str, entry: Mapping[str, Any], path: str) -> Tensor:
    """The tensor of one entry of the header; `get_tensor` of safetensors does the same four times slower."""
    dtype = TYPES.get(entry["dtype"])
    if dtype is None:
        raise InputError(f"path: {name} in {path} has type {entry['dtype']}, expected one of {', '.join(TYPES)}")
    first, last = entry["data_offsets"]
    if first == last:
        return torch.empty(entry["shape"], dtype=dtype)
    count = (last - first) // dtype.itemsize
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start + first).view(entry["shape"])


def _is_pickle(file: Path) -> bool:
    """By the first bytes of a zip, as torch.save writes, or of pickle's protocols 2 to 5."""
    with file.open("rb") as opened:
        start = opened.read(4)
    return start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key appears twice")
    return content


def _not_a_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
