"""Ways of pruning a network to a budget: Torch-Pruning's criteria and pruners, a direct measurement, and ours.

A contender takes a `Subject`, a `Budget` and the epochs of fine-tuning it may spend, and returns a new model. All see
the same images. BatchNorm's means and variances are set on these, or means only, where layers made up for what they
lost. Those that prune once are all fine-tuned in the same way, or for as many passes by the objective that their name
ends in. Faults of Torch-Pruning 1.6.1 are mended for the contenders that have them:

- gradient-based criteria sort a group's indices in place, and misread groups of some channels (`sorted_copy`);
- Hessian keeps the last sample's gradients only: it gets the mean of their squares over all samples;
- OBD-C sets hooks that fail on modules in place: it gets the same squares, exact ones, as its Fisher information.

Left as it is: Taylor leaves BatchNorm's scales out of its sums, and groups without BatchNorm are not pruned by scales.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from operator import methodcaller
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchattacks
from torch import Tensor, nn

from benchmarks.networks import BATCH_SIZE, EPS, FINETUNING
from benchmarks.networks import dense as dense_network
from tp_mrs import MRSImportance, allocate, evaluate, finetune, mrpf, recalibrate
from tp_mrs.allocation import amount
from tp_mrs.architectures import LAYERS, refresh
from tp_mrs.attacks import AttackLike, Perturb, bind, named_attack, parse_eps
from tp_mrs.borrowing import borrowed
from tp_mrs.compensation import step_with
from tp_mrs.data import ImageData, make_loader, random_subset
from tp_mrs.errors import InputError, device_of
from tp_mrs.importance import lent_gradients, sorted_copy
from tp_mrs.measuring import Measurement, measure
from tp_mrs.objectives import Objective, resolve, rslad
from tp_mrs.pruning import build_pruner, prunable_groups, prune_by_ratio, pruner_kwargs

CRITERION_ATTACK = "pgd-10"
CALIBRATION_IMAGES, SQUARED_IMAGES, TRIED_IMAGES = 512, 128, 256
"""What criteria see; those that need each image's gradient; the one that prunes each group on trial."""

TRIED_RATIO = 0.3
TOLERANCE, SEARCH_STEPS = 0.005, 12
FARTHEST = 0.1
"""From the budget, as a fraction of it, that a single ratio may come out: whole channels allow no better."""

REGULARISING_EPOCHS = 1.0


class Budget(NamedTuple):
    """A fraction of the dense network's `"macs"` or `"params"`."""

    measure: str
    target: float

    @property
    def text(self) -> str:
        """Such as `"macs-50"`."""
        return f"{self.measure}-{100 * self.target:g}"


class Subject:
    """A dense network and the images that criteria see; what several contenders need is worked out once."""

    def __init__(
        self,
        data: ImageData,
        network: str,
        seed: int,
        *,
        model: nn.Module | None = None,
        images: int = CALIBRATION_IMAGES,
    ) -> None:
        self._given = model
        self.data, self.network, self.seed, self.images = data, network, seed, images
        self.eps = parse_eps(EPS[data.name])
        calibration = random_subset(data.calibration, images, seed=seed)
        self.calibration: list[tuple[Tensor, Tensor]] = list(make_loader(calibration, batch_size=128))
        self.attack = named_attack(CRITERION_ATTACK, eps=self.eps)
        self.adversarial = Evidence(self, self.attack)
        self.clean = Evidence(self, torchattacks.VANILA)

    @cached_property
    def model(self) -> nn.Module:
        """The one given, or the trained one."""
        return self._given or dense_network(self.data, self.network, seed=self.seed)

    def of(self, model: nn.Module) -> Subject:
        """The same images for another network."""
        return (
            self
            if model is self.model
            else Subject(self.data, self.network, self.seed, model=model, images=self.images)
        )

    @cached_property
    def example(self) -> Tensor:
        """Zeros of an image's shape, (1, C, H, W)."""
        return torch.zeros(1, *self.data.shape, device=device_of(self.model))

    @property
    def train_data(self) -> Any:
        return make_loader(self.data.train, batch_size=BATCH_SIZE[self.data.name], shuffle=True, seed=self.seed)

    @property
    def finetuning(self) -> dict[str, Any]:
        """Arguments of `finetune` that are the same for all."""
        return {"eps": self.eps, "seed": self.seed, "progress": False, **FINETUNING[self.data.name]}


class Evidence:
    """What the dense network's gradients say on attacked, or on clean, images."""

    def __init__(self, subject: Subject, attack: AttackLike) -> None:
        self.subject, self.attack = subject, attack

    @cached_property
    def measurement(self) -> Measurement:
        """First-order scores, and the mean gradient."""
        subject = self.subject
        settings: dict[str, Any] = {"seed": subject.seed, "progress": False}
        return measure(subject.model, subject.calibration, self.attack, moments=True, **settings)

    @cached_property
    def squares(self) -> dict[str, Tensor]:
        """Parameter → the mean square of each image's gradient."""
        model, batch = self.subject.model, self.subject.calibration[0]
        torch.manual_seed(self.subject.seed)
        labels = batch[1].to(device_of(model))
        images = bind(self.attack, model)(batch[0].to(labels.device), labels)[:SQUARED_IMAGES]
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = [torch.zeros_like(parameter) for parameter in parameters]
        for image, label in zip(images, labels, strict=False):
            loss = F.cross_entropy(model(image[None]), label[None])
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for square, gradient in zip(found, gradients, strict=True):
                if gradient is not None:
                    square += gradient.square() / len(images)
        return dict(zip(names, found, strict=True))


Contender: TypeAlias = Callable[[Subject, Budget, float], nn.Module]
"""Subject, budget and epochs of fine-tuning → a new model."""

Prune: TypeAlias = Callable[[Subject, Budget], nn.Module]
"""Subject and budget → a new model, with BatchNorm's statistics set."""

Make: TypeAlias = Callable[[Subject, nn.Module], Any]
"""Makes an importance for a copy of the subject's model."""


class Tuning(NamedTuple):
    """What `finetune` is told in place of `FINETUNING`, and the passes, forward and back, that an image takes."""

    changes: Callable[[Subject], dict[str, Any]]
    passes: float


FAST = Tuning(lambda subject: {}, passes=2)
TUNINGS = {
    "MART": Tuning(lambda subject: {"objective": "mart", "attack": "ffgsm"}, passes=3),
    "RSLAD": Tuning(lambda subject: {"objective": rslad(subject.model), "attack": "ffgsm"}, passes=10 / 3),
}
"""Other objectives; the last learns from the dense network, which sees each image forward only."""


def retuned(name: str, tuning: str) -> str:
    """What a contender is called that is fine-tuned in this way of `TUNINGS`, or as usual if it is empty."""
    return f"{name}, {tuning}" if tuning else name


def tuning_of(name: str) -> tuple[str, str]:
    """The contender's name without its tuning, and that."""
    base, _, last = name.rpartition(", ")
    return (base, last) if last in TUNINGS else (name, "")


@dataclass(frozen=True)
class Once:
    """Prune, fine-tune: for as many passes as fast adversarial training takes."""

    prune: Prune
    tuning: Tuning = FAST

    def __call__(self, subject: Subject, budget: Budget, epochs: float) -> nn.Module:
        model = copy.deepcopy(_pruned(self.prune, subject, budget))
        if epochs:
            equal = epochs * FAST.passes / self.tuning.passes
            changes = self.tuning.changes(subject)
            finetune(model, subject.train_data, epochs=equal, **{**subject.finetuning, **changes})
        return model


@lru_cache(maxsize=1)
def _pruned(prune: Prune, subject: Subject, budget: Budget) -> nn.Module:
    """Kept, for the next number of epochs."""
    return prune(subject, budget)


# --- importances -----------------------------------------------------------------------------------------------------


class Lent(tp.importance.Importance):
    """A gradient-based importance, with the gradients in each parameter's `.grad` while it scores."""

    def __init__(self, model: nn.Module, base: Any, gradients: dict[str, Tensor]) -> None:
        self.model, self.base, self.gradients = model, base, gradients

    def __call__(self, group: Any) -> Tensor | None:
        with lent_gradients(self.model, self.gradients):
            scores: Tensor | None = self.base(sorted_copy(group))
        return scores


class MeasuredBefore(MRSImportance):
    """MRSImportance for a copy of a model that is measured already: looking for a ratio takes many copies."""

    shared: Measurement

    def measurement(self) -> Measurement:
        return self.shared


def plain(importance: Callable[[], Any]) -> Make:
    """One that needs no data."""
    return lambda subject, model: importance()


def with_gradients(importance: Callable[[], Any], kind: str = "adversarial") -> Make:
    """One that reads each parameter's `.grad`: the mean gradient on `"adversarial"` or `"clean"` images."""

    def make(subject: Subject, model: nn.Module) -> Any:
        return Lent(model, importance(), evidence(subject, kind).measurement.gradients)

    return make


taylor = partial(with_gradients, tp.importance.TaylorImportance)


def hessian(kind: str) -> Make:
    def make(subject: Subject, model: nn.Module) -> Any:
        return Lent(model, tp.importance.HessianImportance(), evidence(subject, kind).squares)

    return make


def obdc(kind: str) -> Make:
    def make(subject: Subject, model: nn.Module) -> Any:
        squares = evidence(subject, kind).squares
        base = tp.importance.OBDCImportance(num_classes=subject.data.num_classes)
        base.Fisher = {
            module: squares[f"{name}.weight"].flatten(1)
            for name, module in model.named_modules()
            if isinstance(module, LAYERS)
        }
        base.steps = 1
        return Lent(model, base, squares)

    return make


def evidence(subject: Subject, kind: str) -> Evidence:
    found: Evidence = getattr(subject, kind)
    return found


def mrs(base: Any, kind: str = "adversarial") -> Callable[[Subject, nn.Module], MRSImportance]:
    """MRSImportance on the subject's images."""

    def make(subject: Subject, model: nn.Module) -> MRSImportance:
        importance = MeasuredBefore(model, subject.calibration, subject.attack, base=base)
        importance.shared = evidence(subject, kind).measurement
        return importance

    return make


# --- BatchNorm's statistics after pruning ----------------------------------------------------------------------------

Settle: TypeAlias = Callable[[Subject, nn.Module], nn.Module]


def anew(subject: Subject, model: nn.Module) -> nn.Module:
    """Means and variances of the calibration images."""
    return recalibrate(model, subject.calibration, progress=False)


def means_only(subject: Subject, model: nn.Module) -> nn.Module:
    """The variances are those that the dense network learned."""
    return recalibrate(model, subject.calibration, variances=False, progress=False)


@torch.no_grad()
def half_way(subject: Subject, model: nn.Module) -> nn.Module:
    """Means of the calibration images, and the geometric mean of their variances and the learned ones.

    Of what each layer reads when those before it are set already.
    """

    def settle(norm: Any, arguments: tuple[Tensor, ...]) -> None:
        values = arguments[0].transpose(0, 1).flatten(1)
        norm.running_mean.copy_(values.mean(dim=1))
        norm.running_var.mul_(values.var(dim=1)).sqrt_()

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    model.eval()(torch.cat([images for images, _ in subject.calibration]))
    for hook in hooks:
        hook.remove()
    return model


# --- ways of pruning -------------------------------------------------------------------------------------------------

SCOPES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}
"""Torch-Pruning's: one ratio for all groups, one ranking of all channels, or one for groups of the same structure."""


def by_ratio(
    make: Make,
    scope: str,
    dense: Callable[[Subject], nn.Module] | None = None,
    *,
    compensate: bool = False,
    settle: Settle | None = None,
    round_to: int | None = None,
) -> Prune:
    """Torch-Pruning's own way: one pruning ratio for the network, here the one that meets the budget.

    Args:
        make: the importance.
        scope: of `SCOPES`.
        dense: makes another model than the subject's own to start from.
        compensate: whether layers make up for the channels that go, as in ours.
        settle: what is done about BatchNorm; as in ours unless told otherwise, which depends on `compensate`.
        round_to: keep multiples of so many channels.
    """
    options: dict[str, Any] = {"round_to": round_to, **SCOPES[scope]}

    def prune(subject: Subject, budget: Budget) -> nn.Module:
        model = dense(subject) if dense else subject.model
        whole = amount(subject.model, subject.example, budget.measure)

        def at(ratio: float) -> tuple[float, nn.Module]:
            torch.manual_seed(subject.seed)
            pruned = copy.deepcopy(model)
            importance = make(subject, pruned)
            pruner = build_pruner(pruned, subject.example, importance, pruning_ratio=ratio, **options)
            stepping(subject, compensate)(pruner)
            return amount(refresh(pruned), subject.example, budget.measure) / whole, pruned

        low, high = 0.0, 1.0
        best, nearest = math.inf, model
        for _ in range(SEARCH_STEPS):
            middle = (low + high) / 2
            found, pruned = at(middle)
            error = abs(found / budget.target - 1)
            if error < best:
                best, nearest = error, pruned
            if error < TOLERANCE:
                break
            low, high = (middle, high) if found > budget.target else (low, middle)
        if best > FARTHEST:
            raise InputError(
                f"{budget.text}: no ratio comes within {FARTHEST:.0%} of it; the nearest misses by {best:.0%}"
            )
        return settled(subject, nearest, compensate, settle)

    return prune


Scores: TypeAlias = Callable[[Subject], Any]
"""What `allocate` goes by: a `Sensitivity`, or a score for each group."""


def allocated(
    make: Make,
    scores: Scores,
    alpha: float = 0.5,
    *,
    compensate: bool = False,
    settle: Settle | None = None,
) -> Prune:
    """Ratios from `allocate`, channels within a group by the importance."""

    def prune(subject: Subject, budget: Budget) -> nn.Module:
        model = copy.deepcopy(subject.model)
        wanted: dict[str, Any] = {budget.measure: budget.target}
        ratios = allocate(model, subject.example, scores(subject), alpha=alpha, **wanted)
        prune_by_ratio(model, subject.example, ratios, make(subject, model), stepping(subject, compensate))
        return settled(subject, model, compensate, settle)

    return prune


def settled(subject: Subject, model: nn.Module, compensated: bool, settle: Settle | None) -> nn.Module:
    """By default as `mrpf` does it: layers that made up for what they lost keep their variances."""
    return (settle or (means_only if compensated else anew))(subject, model)


def stepping(subject: Subject, compensate: bool) -> Callable[[Any], None]:
    """What takes a pruner's step."""
    if not compensate:
        return methodcaller("step")
    return partial(step_with, moments=subject.adversarial.measurement.moments)


def sensitivity(subject: Subject) -> Any:
    return subject.adversarial.measurement.sensitivity(prunable_groups(subject.model, subject.example))


def clean_sensitivity(subject: Subject) -> Any:
    """Without the adversarial loss."""
    return subject.clean.measurement.sensitivity(prunable_groups(subject.model, subject.example))


def largest_member(subject: Subject) -> dict[str, float]:
    """Without coupling: the score of the most sensitive layer of each group."""
    measurement, groups = subject.adversarial.measurement, prunable_groups(subject.model, subject.example)
    return {group.name: max(measurement.typical([layer]) for layer in group.layers) for group in groups}


def tried(subject: Subject) -> dict[str, float]:
    """Group → robust accuracy that it costs to prune this group alone, by L2; at least half an image's worth."""
    batches = subject.calibration[: max(1, TRIED_IMAGES // len(subject.calibration[0][0]))]

    def accuracy(model: nn.Module) -> float:
        recalibrate(model, subject.calibration, progress=False)
        found = evaluate(model, batches, [CRITERION_ATTACK], eps=subject.eps, latency=False, progress=False)
        return found.robust[CRITERION_ATTACK]

    before, found = accuracy(copy.deepcopy(subject.model)), {}
    for group in prunable_groups(subject.model, subject.example):
        model = copy.deepcopy(subject.model)
        prune_by_ratio(model, subject.example, {model.get_submodule(group.name): TRIED_RATIO}, L2())
        after = accuracy(model)
        found[group.name] = max(before - after, 0.5 / TRIED_IMAGES)
    return found


def in_rounds(rounds: int, **changes: Any) -> Contender:
    """`mrpf`: the epochs are shared between the rounds."""

    def run(subject: Subject, budget: Budget, epochs: float) -> nn.Module:
        model = copy.deepcopy(subject.model)
        wanted: dict[str, Any] = {budget.measure: budget.target, **subject.finetuning, **changes}
        mrpf(
            model,
            subject.example,
            subject.train_data,
            subject.attack,
            rounds=rounds,
            epochs=epochs / rounds,
            calibration_data=subject.calibration,
            train_attack=wanted.pop("attack", None),
            **wanted,
        )
        return model

    return run


def one_round(**changes: Any) -> Prune:
    """One round of `mrpf` without fine-tuning."""
    run = in_rounds(1, **changes)
    return lambda subject, budget: run(subject, budget, 0.0)


def in_steps(prune: Prune, steps: int = 4) -> Prune:
    """Prune by so many equal fractions, each time by what the network that is left gives.

    Where a criterion has a `min_keep`, it is a fraction of what each step finds.
    """

    def run(subject: Subject, budget: Budget) -> nn.Module:
        whole = amount(subject.model, subject.example, budget.measure)
        model = subject.model
        for step in range(1, steps + 1):
            there = amount(model, subject.example, budget.measure) / whole
            wanted = budget.target ** (step / steps) / there
            model = prune(subject.of(model), Budget(budget.measure, wanted))
        return model

    return run


# --- pruners that regularise before they prune -----------------------------------------------------------------------

UPSTREAM_STEPS = 100 * 391
UPSTREAM_SHRINKAGE, UPSTREAM_GROWTH = 0.01 * 5e-4 * UPSTREAM_STEPS, 1e-4 / 5e-4
"""Learning rate times strength times steps of Torch-Pruning's CIFAR-10 recipes, and what an epoch of theirs adds."""


def regularised(pruner: Callable[..., Any], importance: Callable[[], Any]) -> Callable[[Subject], nn.Module]:
    """A copy of the subject's model, fine-tuned under one of Torch-Pruning's regularising pruners.

    In fewer steps than upstream takes, so much stronger: that holds for SGD only, as Adam would divide what they add by
    its size.
    """

    @lru_cache(maxsize=1)
    def train(subject: Subject) -> nn.Module:
        model, settings = copy.deepcopy(subject.model), subject.finetuning
        recipe = resolve(settings["objective"])
        if settings["optimizer"] != "sgd":
            raise InputError(
                f"optimizer: a regularising pruner's strength is that for SGD, not {settings['optimizer']}"
            )
        images = len(subject.data.train)  # type: ignore[arg-type]
        steps = REGULARISING_EPOCHS * images / BATCH_SIZE[subject.data.name]
        strength = UPSTREAM_SHRINKAGE / (settings["lr"] * steps)
        growing = {"delta_reg": strength * UPSTREAM_GROWTH} if pruner is tp.pruner.GrowingRegPruner else {}
        with borrowed(model):
            regulariser = pruner(
                model,
                subject.example,
                importance=importance(),
                global_pruning=True,
                reg=strength,
                **growing,
                **pruner_kwargs(model),
            )
        objective = Regularised(recipe.objective, regulariser, every=max(1, round(steps / 100)))
        settings |= {"objective": objective, "attack": recipe.attack}
        finetune(model, subject.train_data, epochs=REGULARISING_EPOCHS, **settings)
        return model

    return train


@dataclass
class Regularised:
    """An objective, plus a term whose gradient is what a regularising pruner adds to each parameter's."""

    objective: Objective
    regulariser: Any
    every: int
    step: int = 0

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, attack: Perturb) -> Tensor:
        loss = self.objective(model, images, labels, attack)
        if self.step and self.step % self.every == 0 and hasattr(self.regulariser, "update_reg"):
            self.regulariser.update_reg()
        self.step += 1
        with lent_gradients(model, {}):
            self.regulariser.regularize(model)
            pulls = [(parameter, parameter.grad) for parameter in model.parameters()]
        return loss + torch.stack([(parameter * pull).sum() for parameter, pull in pulls if pull is not None]).sum()


# --- all of them -----------------------------------------------------------------------------------------------------

L2 = tp.importance.MagnitudeImportance
MAGNITUDES: dict[str, Callable[[], Any]] = {
    "L1": partial(tp.importance.MagnitudeImportance, p=1),
    "L2": L2,
    "FPGM": tp.importance.FPGMImportance,
    "LAMP": tp.importance.LAMPImportance,
    "BN scale": tp.importance.BNScaleImportance,
}
GRADIENTS: dict[str, Callable[[str], Make]] = {"Taylor": taylor, "Hessian": hessian, "OBD-C": obdc}

REGULARISED: dict[str, Once] = {
    "BNScalePruner": Once(
        by_ratio(
            plain(tp.importance.BNScaleImportance),
            "global",
            regularised(tp.pruner.BNScalePruner, tp.importance.BNScaleImportance),
        )
    ),
    "GroupNormPruner": Once(by_ratio(plain(L2), "global", regularised(tp.pruner.GroupNormPruner, L2))),
    "GrowingRegPruner": Once(by_ratio(plain(L2), "global", regularised(tp.pruner.GrowingRegPruner, L2))),
}
"""What Torch-Pruning prunes after training: by an epoch of that, which no other contender gets."""

OTHERS: dict[str, Once] = {
    "random, uniform": Once(by_ratio(plain(tp.importance.RandomImportance), "uniform")),
    **{
        f"{label}, {scope}": Once(by_ratio(plain(importance), scope))
        for label, importance in MAGNITUDES.items()
        for scope in SCOPES
        if (label, scope) != ("LAMP", "uniform")  # which ranks each group's channels as L2 does
    },
    **{
        f"{label} ({kind}), {scope}": Once(by_ratio(make(kind), scope))
        for label, make in GRADIENTS.items()
        for kind in ("adversarial", "clean")
        for scope in SCOPES
    },
    **REGULARISED,
    "prune and measure, L2": Once(allocated(plain(L2), tried)),
}


def own(kind: str = "adversarial") -> Make:
    """As `mrpf` picks the channels of a group, whose number is set already."""
    return lambda subject, model: mrs("sensitivity", kind=kind)(subject, model).base_scores


MAIN = "mrpf"
"""The one that others are compared with, pair by pair."""

OWN, IN_ONE_ROUND = own(), Once(one_round())
OURS: dict[str, Contender] = {
    MAIN: IN_ONE_ROUND,
    "mrpf, 2 rounds": in_rounds(2, iterative_steps=2),
    "MRS allocate": Once(allocated(OWN, sensitivity)),
    "MRS allocate + L2": Once(allocated(plain(L2), sensitivity)),
    "MRS allocate + Taylor": Once(allocated(taylor("adversarial"), sensitivity)),
    "MRSImportance, global": Once(by_ratio(mrs("sensitivity"), "global")),
    "MRSImportance + Taylor, global": Once(by_ratio(mrs("taylor"), "global")),
    "MRSImportance + L2, global": Once(by_ratio(mrs("magnitude"), "global")),
}
"""`mrpf` in one round is fine-tuned as the others are; `allocate` alone does not compensate, and prunes at once."""


compensated = partial(by_ratio, compensate=True)
COMPENSATED: dict[str, Once] = {
    "L2, uniform, compensated": Once(compensated(plain(L2), "uniform")),
    "L2, uniform, compensated, 4 steps": Once(in_steps(compensated(plain(L2), "uniform"))),
    "L2, global, compensated": Once(compensated(plain(L2), "global")),
    "L2, global, compensated, 4 steps": Once(in_steps(compensated(plain(L2), "global"))),
    "BN scale, global, compensated, 4 steps": Once(in_steps(compensated(plain(MAGNITUDES["BN scale"]), "global"))),
    "Taylor (adversarial), global, compensated": Once(compensated(taylor("adversarial"), "global")),
    "MRSImportance, global, compensated": Once(compensated(mrs("sensitivity"), "global")),
}
"""Criteria for Torch-Pruning's pruners with our compensation: what is left of the lead is the sensitivities' own."""

ROUNDED: dict[str, Contender] = {
    "mrpf, multiples of 8": Once(one_round(round_to=8)),
    "L2, uniform, multiples of 8": Once(by_ratio(plain(L2), "uniform", round_to=8)),
    "L2, uniform, compensated, multiples of 8": Once(compensated(plain(L2), "uniform", round_to=8)),
}
"""Numbers of channels that hardware likes."""

SETTLED: dict[str, Contender] = {
    "L2, uniform, variances half way": Once(by_ratio(plain(L2), "uniform", settle=half_way)),
    "L2, uniform, means only": Once(by_ratio(plain(L2), "uniform", settle=means_only)),
}
"""Without compensation, and with what `mrpf` does about BatchNorm, or half of it."""

VARIANTS: dict[str, Contender] = {
    "mrpf, 1 step": Once(one_round(iterative_steps=1)),
    "mrpf, 1 step, new variances": Once(allocated(OWN, sensitivity, compensate=True, settle=anew)),
}

ABLATIONS: dict[str, Contender] = {
    "without coupling: largest layer": Once(allocated(OWN, largest_member)),
    "without attack: clean sensitivity": Once(allocated(own("clean"), clean_sensitivity)),
    "without allocation: α = 0": Once(allocated(OWN, sensitivity, alpha=0.0)),
    "with more of it: α = 1": Once(allocated(OWN, sensitivity, alpha=1.0)),
}

BESIDE = "L2, uniform, compensated, 4 steps"
"""The simplest criterion with our compensation and as many steps."""

RETUNABLE = {
    **{name: OTHERS[name] for name in ("L2, uniform", "FPGM, uniform")},
    MAIN: IN_ONE_ROUND,
    BESIDE: COMPENSATED[BESIDE],
}
RETUNED: dict[str, Contender] = {
    retuned(name, tuning): replace(contender, tuning=TUNINGS[tuning])
    for tuning in TUNINGS
    for name, contender in RETUNABLE.items()
}
"""Fine-tuned by another objective."""

CONTENDERS: dict[str, Contender] = {
    **OTHERS,
    **OURS,
    **COMPENSATED,
    **ROUNDED,
    **RETUNED,
    **SETTLED,
    **VARIANTS,
    **ABLATIONS,
}
