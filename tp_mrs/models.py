"""Make timm models ready: small images, and normalisation inside the model."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.mobilevit import MobileVitBlock, MobileVitV2Block
from timm.models.resnet import ResNet
from timm.models.vgg import VGG, ConvMlp
from torch import Tensor, nn

from .errors import InputError, check_count, naming
from .hub import FAILURES, FOLDER, HUB, not_downloaded, timm_config

logger = logging.getLogger(__name__)

SMALL_IMAGE = 64
"""Images of at most this many pixels a side get a network that does not shrink them at its entrance."""

WEIGHT_SOURCES = {
    "cache_dir",
    "checkpoint_path",
    "model_name",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_custom_load",
    "pretrained_filter_fn",
    "pretrained_model_args",
    "pretrained_strict",
    "pruned",
}
"""timm's arguments that say where weights come from. A saved model brings its own, so they are not remembered."""

# What timm's constructors raise when an argument does not suit them.
_CANNOT_MAKE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def create_model(
    architecture: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    image_size: int = 224,
    pretrained: bool = False,
    **arguments: Any,
) -> nn.Module:
    """`timm.create_model`, fitted to small images, and remembering how it was made so that it can be saved.

    At 64 pixels and less, a ResNet gets a 3×3 stem of stride 1 without pooling, a VGG a 1×1 head in place of the
    7×7 one, and MobileViT a stem of stride 1: the usual forms for CIFAR. Other families stay as timm makes them.

    Args:
        architecture: a name from `timm.list_models()`, with a tag or without; or of a model that timm loads from the
            Hugging Face hub, `hf-hub:owner/name` or `timm/name`, or from a folder, `local-dir:path`.
        num_classes: number of outputs.
        in_chans: channels of the images.
        image_size: height and width of the images, in pixels.
        pretrained: load its weights; timm downloads them. Layers for which there are none, as for another
            `num_classes` or for small images, start untrained, and a warning names them. The statistics of images that
            the weights expect are in `model.pretrained_cfg`: `normalize(model, cfg["mean"], cfg["std"])`.
        **arguments: further arguments of timm's, such as `channels=(16, 32, 64, 128)` for a narrow ResNet.

    Raises:
        InputError: timm has no such model, an argument is out of range, or something can't be downloaded.
    """
    check_count("num_classes", num_classes)
    check_count("in_chans", in_chans)
    check_count("image_size", image_size)
    source = f"{HUB}{architecture}" if architecture.startswith("timm/") else architecture
    plain, noted = _resolved(source)
    try:
        model = timm.create_model(
            source, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **arguments
        )
    except FAILURES as error:
        raise InputError(f"model: {not_downloaded(f'the weights of {architecture}', error)}") from error
    except _CANNOT_MAKE as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(f"model: timm cannot make {architecture!r} with {arguments}: {why}") from error
    if image_size <= SMALL_IMAGE:
        _fit_small_images(model, in_chans)
    if pretrained and (untrained := left_untrained(model, image_size)):
        logger.warning("%s: its weights leave untrained: %s", architecture, untrained)
    with contextlib.suppress(TypeError):  # an argument such as a class cannot be written down
        recipe = {**noted, "architecture": plain, "num_classes": num_classes, "in_chans": in_chans}
        kept = {name: value for name, value in arguments.items() if name not in WEIGHT_SOURCES}
        model.tp_mrs_recipe = json.loads(json.dumps({**recipe, "image_size": image_size, **kept}))
    return model


def _resolved(name: str) -> tuple[str, dict[str, Any]]:
    """The architecture's plain name, and the arguments for it that are noted on the hub or in the folder."""
    if not name.startswith((HUB, FOLDER)):
        _check_architecture(name)
        return name, {}
    with naming("model", "path"):
        config = timm_config(name)
    if "tp_mrs" in config:
        path = name.removeprefix(FOLDER)
        raise InputError(
            f"model: {name} was saved by tp_mrs, with shapes of its own; read it with tp_mrs.load({path!r}), or give "
            f"--checkpoint {path}"
        )
    _check_architecture(config["architecture"])
    return config["architecture"], dict(config.get("model_args") or {})


def _check_architecture(name: str) -> None:
    if timm.is_model(name):
        return
    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
    if "/" in name:
        hint = f"on the Hugging Face hub it is {HUB}{name}"
    raise InputError(f"model: timm has no architecture {name!r}; {hint}")


def left_untrained(model: Any, image_size: int) -> str:
    """The layers of a new model that pretrained weights don't reach, and why; empty if there are none."""
    config, found = model.pretrained_cfg, []
    classes = config.get("num_classes", model.num_classes)
    if model.num_classes != classes:
        found.append(f"{config.get('classifier')} ({model.num_classes} classes in place of {classes})")
    if image_size <= SMALL_IMAGE and isinstance(model, (ResNet, VGG)):
        layer = "conv1" if isinstance(model, ResNet) else "pre_logits, head"
        found.append(f"{layer} (fitted to images of {image_size} pixels)")
    return ", ".join(found)


def _fit_small_images(model: nn.Module, in_chans: int) -> None:
    if isinstance(model, ResNet):
        width = model.bn1.num_features
        model.conv1 = nn.Conv2d(in_chans, width, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif isinstance(model, VGG):
        features = model.pre_logits.fc1.in_channels
        model.pre_logits = ConvMlp(features, features, kernel_size=1, drop_rate=0.0)
        model.num_features = model.head_hidden_size = features
        model.head.in_features = features
        model.reset_classifier(model.num_classes)
    elif any(isinstance(module, MobileVitBlock | MobileVitV2Block) for module in model.modules()):
        stem: Any = model.get_submodule("stem.conv")
        stem.stride = (1, 1)


def normalize(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Make `model` normalise its images itself, so that attacks and perturbation sizes live in [0, 1].

    The model is changed in place and returned. Its modules keep their names and its state dict its keys: the statistics
    are two buffers outside the state dict, used by a forward pre-hook. Calling again replaces them.

    Args:
        model: takes images of shape (N, C, H, W).
        mean: per channel, in units of [0, 1]; C numbers, or one for all.
        std: likewise, above 0.

    Raises:
        InputError: lengths differ or don't fit the model, a std is not positive, or a mean is outside [0, 1].

    Examples:
        >>> model = normalize(nn.Sequential(nn.Flatten()), [0.5], [0.25])
        >>> model(torch.full((1, 1, 1, 2), 0.75))
        tensor([[1., 1.]])
    """
    if len(mean) != len(std) or len(mean) == 0 or min(std) <= 0:
        raise InputError(f"mean, std: expected one of each per channel with std > 0, got mean={mean}, std={std}")
    if min(mean) < 0 or max(mean) > 1:
        raise InputError(f"mean: expected values in [0, 1], the range of the images, got {mean}; divide by 255?")
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and len(mean) not in (1, first.in_channels):
        raise InputError(f"mean, std: the model takes {first.in_channels} channels, got {len(mean)} values")
    first_time = normalization(model) is None
    reference = next(model.parameters(), torch.empty(0))
    for name, values in ((_MEAN, mean), (_STD, std)):
        statistics = torch.tensor(values, dtype=reference.dtype, device=reference.device).view(1, -1, 1, 1)
        model.register_buffer(name, statistics, persistent=False)
    if first_time:
        model.register_forward_pre_hook(_normalize_input)
    return model


def normalization(model: nn.Module) -> tuple[list[float], list[float]] | None:
    """Mean and std that `normalize` gave the model; None if it did not."""
    mean, std = getattr(model, _MEAN, None), getattr(model, _STD, None)
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        return None
    return mean.flatten().tolist(), std.flatten().tolist()


NORMALIZATION_BUFFERS = _MEAN, _STD = "tp_mrs_mean", "tp_mrs_std"


def _normalize_input(model: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    images, mean = inputs[0], getattr(model, _MEAN)
    if mean.shape[1] not in (1, images.shape[1]):  # grey images would pass for coloured ones
        raise InputError(
            f"images: expected {mean.shape[1]} channels, as normalised by the model, got {images.shape[1]}"
        )
    return ((images - mean) / getattr(model, _STD), *inputs[1:])
