"""The package's version, and those of what it stands on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    found = {"tp_mrs": __version__}
    for package in ("torch", "torch-pruning", "torchattacks", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # vendored, or run from a checkout
            found[package] = "unknown"
    return found
