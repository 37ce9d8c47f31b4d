"""The dense, adversarially trained networks that benchmarks start from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_mrs.attacks import parse_eps
from tp_mrs.data import ImageData
from tp_mrs.dense import dense_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PHOTOGRAPHS = ("cifar10", "cifar100", "svhn", "tiny-imagenet")

EPS = {"digits": "0.1"} | dict.fromkeys(PHOTOGRAPHS, "8/255")

BATCH_SIZE = {"digits": 32} | dict.fromkeys(PHOTOGRAPHS, 128)

_ADAMW: dict[str, Any] = {"lr": 0.005, "optimizer": "adamw"}
_FAST: dict[str, Any] = {"precision": "bf16", "channels_last": True}

TRAINING: dict[str, dict[str, Any]] = {
    "digits": {"objective": "pgd", "attack": "pgd-3", "epochs": 8, **_ADAMW, **_FAST},
} | {data: {"objective": "fgsm", "epochs": 10, "lr": 0.1, "optimizer": "sgd", **_FAST} for data in PHOTOGRAPHS}

FINETUNING: dict[str, dict[str, Any]] = {"digits": {"objective": "fgsm", **_ADAMW, **_FAST}} | {
    data: {"objective": "fgsm", "lr": 0.05, "optimizer": "sgd", **_FAST} for data in PHOTOGRAPHS
}
"""Of pruned networks: fast adversarial training, for all alike."""

_LONG: dict[str, Any] = {"objective": "pgd", "attack": "pgd-7", "epochs": 30}

NETWORKS: dict[tuple[str, str], dict[str, Any]] = {
    ("digits", "narrowest resnet18"): {
        "arguments": {"channels": [8, 16, 32, 64]},
        "objective": "fgsm",
        "attack": "ffgsm",
    },
    ("digits", "resnet18"): {"arguments": {"channels": [32, 64, 128, 256]}},
    ("digits", "narrow resnet18"): {"arguments": {"channels": [16, 32, 64, 128]}},
    ("digits", "vgg11_bn"): {},
    ("digits", "mobilevit_xxs"): {},
    ("cifar10", "resnet18"): {"arguments": {"channels": [16, 32, 64, 128]}},
    ("cifar10", "vgg11_bn"): {"epochs": 1},
    ("cifar10", "mobilevit_xxs"): {"epochs": 1, **_ADAMW},
    ("cifar10", "full resnet18"): _LONG,
    ("cifar10", "full vgg16_bn"): _LONG,
    ("cifar10", "full mobilevit_xxs"): {**_LONG, **_ADAMW},
    ("cifar100", "full resnet18"): _LONG,
    ("svhn", "full resnet18"): _LONG,
    ("tiny-imagenet", "full resnet18"): _LONG,
}
"""Data and name → what is special in making and training it. Long runs on a CPU are short of epochs."""


def dense(data: ImageData, name: str, *, seed: int = 0) -> nn.Module:
    """The network, read from the cache of tp_mrs if it has been trained before."""
    special = dict(NETWORKS[data.name, name])
    return dense_model(
        data,
        name.split()[-1],
        arguments=special.pop("arguments", {}),
        batch_size=BATCH_SIZE[data.name],
        seed=seed,
        eps=parse_eps(EPS[data.name]),
        device=DEVICE,
        **{**TRAINING[data.name], **special},
    )
