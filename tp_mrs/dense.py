"""A dense, adversarially trained model to start from, trained once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .borrowing import preserved_rng
from .data import ImageData, files_of, make_loader
from .files import check_output_folder
from .finetuning import finetune
from .models import create_model, normalize
from .processes import place
from .storage import load, save_file
from .tensorfile import FORMAT

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$TP_MRS_CACHE`, or `tp_mrs` in `$XDG_CACHE_HOME`, which by default is `~/.cache`."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TP_MRS_CACHE", caches / "tp_mrs"))


def dense_model(
    data: ImageData,
    architecture: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    cache: Path | None = None,
    progress: bool = True,
    **training: Any,
) -> nn.Module:
    """A timm model for `data` that normalises its images itself, trained by `finetune` or read from the cache.

    Training that was interrupted goes on where it stopped, from a checkpoint beside the file in the cache.

    Args:
        data: what to train on.
        architecture: a timm name.
        arguments: of `create_model`, such as `{"channels": (16, 32, 64, 128)}` or `{"pretrained": True}`.
        batch_size: of training.
        seed: of the initial weights, the order of images, and the attacks.
        device: where to train; part of what the cache tells apart.
        cache: folder to keep it in; `cache_folder()` if None.
        progress: show a bar on a terminal.
        **training: arguments of `finetune`: objective, eps, epochs, lr, …

    Raises:
        InputError: as `create_model` and `finetune`; or the cache cannot be written.
    """
    path = dense_file(
        data,
        architecture,
        arguments=arguments,
        batch_size=batch_size,
        seed=seed,
        device=device,
        cache=cache,
        **training,
    )
    check_output_folder(path.parent)
    if path.exists():
        logger.info("dense model read from %s", path)
        return load(path, device=device)
    model = new_model(data, architecture, arguments, seed=seed).to(device)
    loader = make_loader(data.train, batch_size=batch_size, shuffle=True, seed=seed)
    checkpoint = path.with_suffix(".training.safetensors")
    finetune(model, loader, seed=seed, progress=progress, checkpoint=checkpoint, **training)
    if place()[0] == 0:
        save_file(model, path)
        checkpoint.unlink(missing_ok=True)
    return model.eval()


def new_model(data: ImageData, architecture: str, arguments: Mapping[str, Any] | None, *, seed: int) -> nn.Module:
    """The architecture for `data`, not trained on it; it normalises its images, as pretrained weights expect it.

    Raises:
        InputError: as `create_model`.
    """
    channels, size, _ = data.shape
    arguments = arguments or {}
    model: Any = nn.Module()
    with preserved_rng(model, seed):
        model = create_model(
            architecture, num_classes=data.num_classes, in_chans=channels, image_size=size, **arguments
        )
    config = model.pretrained_cfg
    if arguments.get("pretrained") and len(config["mean"]) == channels:
        return normalize(model, config["mean"], config["std"])
    return normalize(model, data.mean, data.std)


def dense_file(
    data: ImageData,
    architecture: str,
    *,
    arguments: Mapping[str, Any] | None,
    batch_size: int,
    seed: int,
    device: str | torch.device,
    cache: Path | None,
    **training: Any,
) -> Path:
    """Where `dense_model` keeps what it makes of these arguments; the file may be there or not."""
    recipe = {
        "format": FORMAT,
        "data": data.name,
        "train_images": len(data.train),  # type: ignore[arg-type]
        **files_of(data.train),
        "architecture": architecture,
        "arguments": dict(arguments or {}),
        "batch_size": batch_size,
        "seed": seed,
        "device": torch.device(device).type,
        **training,
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]", "-", architecture)  # of models on the hub it has a slash
    return (cache or cache_folder()) / f"{name}-{data.name}-{key}.safetensors"
