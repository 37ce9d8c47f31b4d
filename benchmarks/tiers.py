"""What `python -m benchmarks.run` runs: which contenders, at which budgets, with how much fine-tuning.

All that prune without training are compared at one budget of two networks; elsewhere, those that led there or that
people reach for first. Fine-tuning takes most of the time, and is for few. Each point of `cpu` is among the committed
results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.contenders import (
    BESIDE,
    CONTENDERS,
    MAIN,
    OTHERS,
    REGULARISED,
    RETUNABLE,
    RETUNED,
    ROUNDED,
    SETTLED,
    TUNINGS,
    VARIANTS,
    Budget,
    retuned,
)
from benchmarks.networks import NETWORKS

MORE, WITH_AUTOATTACK = "more images", "with autoattack"
SECOND: dict[str, tuple[str, ...]] = {MORE: ("pgd-20",), WITH_AUTOATTACK: ("pgd-20", "autoattack")}
"""What may be evaluated a second time, on another number of images → by which attacks; the last is what counts."""


class Work(NamedTuple):
    """One dense network to prune to one budget."""

    data: str
    network: str
    budget: Budget
    seed: int


@dataclass(frozen=True)
class Part:
    """Some contenders, taken to some budgets of one network.

    Attributes:
        subject: data and network.
        budgets: to prune to.
        contenders: by name.
        epochs: of fine-tuning; 0 for none.
        seeds: of the dense network, and of all that is drawn.
        test_images: how many to evaluate on.
        attacks: to evaluate with.
        second: on how many test images to evaluate once more, by each of `SECOND` that is wanted.
    """

    subject: tuple[str, str]
    budgets: Sequence[Budget]
    contenders: Sequence[str]
    epochs: Sequence[float] = (0,)
    seeds: Sequence[int] = (0, 1, 2)
    test_images: int = 500
    attacks: Sequence[str] = ("pgd-20",)
    second: Mapping[str, int] = field(default_factory=dict)

    def work(self, seed: int) -> list[Work]:
        return [Work(*self.subject, budget, seed) for budget in self.budgets]

    def points(self) -> Iterator[tuple[Work, str, float]]:
        """Each with its contender and epochs of fine-tuning."""
        for seed in self.seeds:
            for work in self.work(seed):
                for name in self.contenders:
                    yield from ((work, name, point) for point in points_of(name, self.epochs))


def points_of(name: str, epochs: Sequence[float]) -> list[float]:
    """Those that a contender can be at: without fine-tuning, another objective is nothing else."""
    return [point for point in epochs if point or name not in RETUNED]


def macs(*targets: float) -> list[Budget]:
    """As fractions of the dense network's."""
    return [Budget("macs", target) for target in targets]


def params(*targets: float) -> list[Budget]:
    return [Budget("params", target) for target in targets]


def by(tuning: str, names: Iterable[str]) -> list[str]:
    """These, fine-tuned in this way of `TUNINGS`."""
    return [retuned(name, tuning) for name in names]


LEADING = [
    "L1, uniform",
    "L2, uniform",
    "L2, global",
    "FPGM, uniform",
    "BN scale, global",
    "Taylor (adversarial), global",
    "Hessian (adversarial), global",
    "L2, uniform, compensated",
    BESIDE,
    MAIN,
]
"""At every budget."""

LEADING_CIFAR10 = [
    "L2, isomorphic",
    "Taylor (clean), global",
    "Hessian (adversarial), isomorphic",
    "Hessian (clean), isomorphic",
]
"""Beside these, of what was best at the budget of CIFAR-10 that all were run at."""

AT_ONCE = [
    *LEADING,
    *(name for name in CONTENDERS if name not in {*LEADING, *REGULARISED, *RETUNED, *ROUNDED, "mrpf, 2 rounds"}),
]
"""All that prune without training, at once or in steps."""

HELD_OUT = [name for name in AT_ONCE if name in LEADING or name not in OTHERS]
"""On seeds that nothing was chosen by."""

CURVES = [
    "L2, uniform",
    "L2, global",
    "FPGM, uniform",
    "FPGM, global",
    "Taylor (adversarial), global",
    "Hessian (clean), isomorphic",
    BESIDE,
    MAIN,
]
"""Over the first quarter of an epoch."""

TUNED = ["L2, uniform", BESIDE, MAIN]
"""For longer."""

CIFAR10, DIGITS = ("cifar10", "resnet18"), ("digits", "narrow resnet18")
VGG, MOBILEVIT = ("digits", "vgg11_bn"), ("digits", "mobilevit_xxs")

ON_A_GPU = [*LEADING, "GroupNormPruner", "mrpf, 2 rounds", *(name for tuning in TUNINGS for name in by(tuning, TUNED))]

TIERS: dict[str, list[Part]] = {
    "smoke": [
        Part(
            ("digits", "narrowest resnet18"),
            macs(0.5),
            ["random, uniform", "L2, uniform", "Taylor (adversarial), global", MAIN],
            epochs=(0, 1),
            seeds=(0,),
            test_images=100,
        )
    ],
    "cpu": [
        Part(CIFAR10, macs(0.6), AT_ONCE),
        Part(DIGITS, macs(0.25), AT_ONCE),
        Part(CIFAR10, [*macs(0.5, 0.25), *params(0.5)], [*LEADING, *LEADING_CIFAR10]),
        Part(DIGITS, macs(0.75, 0.5, 0.1), LEADING),
        Part(VGG, macs(0.5, 0.25), [*LEADING, "BN scale, isomorphic"]),
        Part(MOBILEVIT, macs(0.5, 0.25), [*LEADING, "MRSImportance, global"]),
        Part(CIFAR10, macs(0.5, 0.25), [*SETTLED, *VARIANTS, "MRS allocate", "MRSImportance, global"]),
        Part(CIFAR10, macs(0.5), [*ROUNDED, "prune and measure, L2"]),
        Part(CIFAR10, macs(0.5), list(REGULARISED), seeds=(0,)),
        Part(DIGITS, macs(0.25), HELD_OUT, seeds=(3, 4)),
        Part(CIFAR10, macs(0.5), CURVES, epochs=(0.02, 0.05, 0.1, 0.25)),
        Part(CIFAR10, macs(0.5), [BESIDE, MAIN], second={MORE: 2000}),
        Part(CIFAR10, macs(0.5), [*RETUNABLE, *by("RSLAD", RETUNABLE)], epochs=(0.25,), second={MORE: 2000}),
        Part(CIFAR10, macs(0.25), [*TUNED, *by("RSLAD", TUNED)], epochs=(0.25,)),
        Part(CIFAR10, macs(0.25), [*TUNED, "mrpf, 1 step", *by("MART", ["L2, uniform", MAIN])], epochs=(2,)),
        Part(DIGITS, macs(0.25, 0.1), [*TUNED, "mrpf, 1 step"], epochs=(0.25, 1, 4)),
        Part(CIFAR10, macs(0.5), TUNED, seeds=(1, 2), second={WITH_AUTOATTACK: 100}),
    ],
    "gpu": [
        Part(subject, budgets, ON_A_GPU, epochs, test_images=1000, attacks=("pgd-20", "autoattack"))
        for subject in NETWORKS
        if subject[1].startswith("full ")
        for budgets, epochs in ((macs(0.5), (0, 1, 5)), ([*macs(0.25), *params(0.25, 0.1)], (5,)))
    ],
}
