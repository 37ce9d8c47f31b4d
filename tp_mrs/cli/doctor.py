"""What an installation is made of: to see at a glance why something runs, or does not."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tp_mrs._version import versions
from tp_mrs.dense import cache_folder

REQUIRED = ("torchvision", "accelerate", "huggingface_hub", "safetensors", "numpy")
"""Packages that come with every installation, besides those in `versions`."""

OPTIONAL = {
    "cli": ("matplotlib", "pyyaml", "rich", "scikit-learn", "shtab"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
}
"""Extra → the packages that it brings."""


def examine() -> dict[str, Any]:
    """Versions, devices, missing packages and the cache, JSON to be."""
    optional = {package: _installed(package) for packages in OPTIONAL.values() for package in packages}
    found = {**versions(), **{package: _installed(package) for package in REQUIRED}, **optional}
    return {
        "packages": {package: number for package, number in found.items() if number is not None},
        "missing": {
            extra: missing
            for extra, packages in OPTIONAL.items()
            if (missing := [package for package in packages if optional[package] is None])
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "cache": _size_of(cache_folder()),
    }


def summary(found: dict[str, Any]) -> str:
    """What `examine` found, as a table, with what to do about what is missing."""
    cache = found["cache"]
    rows = {
        **found["packages"],
        "Python": found["python"],
        "platform": found["platform"],
        "devices": ", ".join(found["devices"]),
        "threads": found["threads"],
        "cache": f"{cache['folder']} ({cache['files']} files, {cache['bytes'] / 1e6:.1f} MB)",
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    for extra, packages in found["missing"].items():
        lines.append(f'Missing: {", ".join(packages)}; pip install "tp_mrs[{extra}]"')
    return "\n".join(lines)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """What torch can use here."""
    names = [
        f"cuda:{index} ({gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda})"
        for index in range(torch.cuda.device_count())
        for gpu in [torch.cuda.get_device_properties(index)]
    ]
    return ["cpu", *names, *(["mps"] if torch.backends.mps.is_available() else [])]


def _size_of(folder: Path) -> dict[str, Any]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"folder": str(folder), "files": len(files), "bytes": sum(path.stat().st_size for path in files)}
