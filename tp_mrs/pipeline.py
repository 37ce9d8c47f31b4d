"""MRPF: measure, allocate, prune, recalibrate, fine-tune, in one or more rounds."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ._version import versions
from .allocation import Planner, check_allocation, is_met, least_units, single_budget
from .attacks import AttackLike, describe
from .batches import check_again
from .borrowing import copied
from .errors import check_count, check_example_inputs, check_flag, check_layers, check_number, naming
from .evaluation import Evaluation, evaluate, measure_latency
from .files import write_json
from .finetuning import Finetuning, check_training, finetune
from .importance import BaseName, MRSImportance, described
from .measuring import Estimator
from .processes import gather, place
from .pruning import prunable_groups
from .recalibration import recalibrate
from .sensitivity import Sensitivity
from .stages import Stages, plainly
from .steps import Pruning, Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
FORMAT = "tp_mrs.report/1"


@dataclass(frozen=True)
class Round:
    """One round of measuring, pruning and fine-tuning.

    Attributes:
        target: the budget after this round, as a fraction of the dense model.
        reached: what the pruned model really has, likewise.
        sensitivity: of the model before pruning, as measured for the first of the round's steps.
        ratios: root layer of each group → fraction of its channels that went.
        widths: root layer of each group → its output channels before and after pruning, in the order of the network.
        pruned: evaluation after recalibrating, before fine-tuning; None without test data.
        finetuning: the training record; None with `epochs=0`.
    """

    target: float
    reached: float
    sensitivity: Sensitivity
    ratios: Mapping[str, float]
    widths: Mapping[str, tuple[int, int]]
    pruned: Evaluation | None
    finetuning: Finetuning | None


@dataclass(frozen=True)
class Report:
    """What `mrpf` did: the model before and after (None without test data), each round, settings and versions.

    `curves` has evaluations at several sizes of perturbation, name of the model → evaluations, if any were made, as by
    `tp-mrs prune --more-eps`.
    """

    before: Evaluation | None
    after: Evaluation | None
    rounds: tuple[Round, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=versions)
    curves: Mapping[str, Sequence[Evaluation]] = field(default_factory=dict)

    @property
    def stages(self) -> dict[str, Evaluation]:
        """The evaluations there are: dense, pruned, fine-tuned."""
        rows = {"dense": self.before, "pruned": self.rounds[-1].pruned}
        if self.rounds[-1].finetuning is not None:
            rows["fine-tuned"] = self.after
        return {name: evaluation for name, evaluation in rows.items() if evaluation is not None}

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Root layer of each group → its output channels, dense and in the end."""
        return {name: (before, _latest(name, self.rounds)[1]) for name, (before, _) in self.rounds[0].widths.items()}

    def __str__(self) -> str:
        lines = [f"{name:<11} {evaluation}" for name, evaluation in self.stages.items()]
        return "\n".join([*lines, f"{self.settings['budget']}: {self.rounds[-1].reached:.1%} of the dense model's"])

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> Path:
        """Write it as JSON. Raises `InputError` if the file cannot be written."""
        return write_json(path, self.to_dict())

    def plot(self) -> Figure:
        """A matplotlib figure of the first round: sensitivity of each group and the pruning ratio it got."""
        first = self.rounds[0]
        return first.sensitivity.plot(first.ratios)


def mrpf(
    model: nn.Module,
    example_inputs: Tensor,
    train_data: Iterable[Any],
    attack: AttackLike,
    *,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    rounds: int = 1,
    iterative_steps: int = 4,
    alpha: float = 0.5,
    min_keep: float = 0.1,
    round_to: int | None = None,
    ignored_layers: Iterable[nn.Module] = (),
    base: BaseName | Callable[[Any], Tensor | None] = "sensitivity",
    compensate: bool = True,
    epsilon: float = 0.1,
    estimator: Estimator = "first_order",
    steps: int = 5,
    calibration_data: Iterable[Any] | None = None,
    max_batches: int | None = None,
    test_data: Iterable[Any] | None = None,
    attacks: Sequence[str | AttackLike] = ("fgsm", "pgd-20"),
    epochs: float = 1,
    eps: float = 8 / 255,
    train_attack: str | AttackLike | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **training: Any,
) -> Report:
    """Module Robust Pruning and Fine-tuning: make `model` smaller, in place, keeping its robustness.

    Each round prunes in several steps and ends with adversarial fine-tuning. A step measures the sensitivity of the
    coupled groups, plans their pruning ratios by it (`allocate`), prunes part of the way with Torch-Pruning, has layers
    make up for what they lose (`compensated_step`), and sets BatchNorm's means anew (`recalibrate`). The budget falls
    geometrically over the rounds.

    Source: Bai et al., arXiv 2410.15176 (a reconstruction).

    Args:
        model: changed in place.
        example_inputs: (N, C, H, W), on the model's device.
        train_data: as for `finetune`.
        attack: for measuring; a torchattacks attack on `model`, or a factory `model -> attack`.
        macs, params, channels: the budget, as a fraction of the dense model's; give exactly one.
        rounds: how many times to prune and fine-tune.
        iterative_steps: of measuring and pruning, in each round. With more, sensitivities and what layers make up for
            stay those of the network that is pruned next, which counts where much goes and little fine-tuning follows;
            each costs a measurement.
        alpha, round_to: as for `allocate`.
        min_keep: least fraction of the dense model's channels that a group keeps, in (0, 1].
        ignored_layers: layers, or blocks of them, that keep their outputs, as for `pruner_kwargs`.
        base: which channels go within a group, as for `MRSImportance`.
        compensate: let layers make up for the channels that they lose, as `compensated_step` does. If not, BatchNorm's
            variances are set anew, too.
        epsilon, estimator, steps: of the report's sensitivities, as for `MRSImportance`; what is pruned does not depend
            on them.
        calibration_data: images to measure and recalibrate on, from the training split; `train_data` if None.
        max_batches: of the calibration data, per step.
        test_data: for evaluating before, after pruning and after fine-tuning; None to skip that.
        attacks: for evaluating.
        epochs: of fine-tuning, each round; 0 for none.
        eps: perturbation size of the objective's attack and of the named `attacks`.
        train_attack: for fine-tuning, as `finetune`'s `attack`.
        seed: of measuring, fine-tuning and evaluating.
        checkpoint: a folder in which to keep what each round has made and how far fine-tuning has come; created if need
            be. Called again with the dense model and the same arguments, after whatever interruption, it goes on from
            there, and model and report become those of an undisturbed run (bit for bit on a CPU, as for `finetune`;
            latencies aside, which are measured). Functions of yours are told apart by name, not by what they do. Remove
            the folder when you have saved the result.
        progress: show bars on a terminal.
        **training: further arguments of `finetune`, such as `objective="trades"` or `lr=0.02`.

    Raises:
        InputError: an argument or a batch is unusable, or the budget can't be met within 1%; or `checkpoint` is damaged
            or of another run. Where an argument is unusable, or the first batch, nothing was changed. Where a later
            batch is, the model may have been pruned already: with `checkpoint`, mend the data and start again from the
            dense model; no work is lost.
        DivergenceError: a loss is not finite.
    """
    budget, target = single_budget(macs=macs, params=params, channels=channels)
    allocating: dict[str, Any] = {"alpha": alpha, "min_keep": min_keep, "round_to": round_to}
    check_options(rounds=rounds, iterative_steps=iterative_steps, epochs=epochs, **allocating)
    check_flag("compensate", compensate)
    check_example_inputs(model, example_inputs)
    ignored = check_layers("ignored_layers", ignored_layers, model)
    training |= {"attack": train_attack, "eps": eps, "progress": progress}
    with naming("train_attack"):
        check_training(model, train_data, epochs=epochs or 1, **training)
    images = calibration_data if calibration_data is not None else train_data
    source = "train_data" if calibration_data is None else "calibration_data"
    measuring: dict[str, Any] = {
        "base": base,
        "epsilon": epsilon,
        "estimator": estimator,
        "steps": steps,
        "max_batches": max_batches,
        "seed": seed,
    }

    importance = partial(MRSImportance, model, images, attack, moments=compensate, progress=progress, **measuring)

    def assess() -> Evaluation | None:
        if test_data is None:
            return None
        check_again("test_data", test_data)
        with naming("test_data"):
            return evaluate(model, test_data, attacks, eps=eps, seed=seed, latency=False, progress=progress)

    with naming(source):
        importance()  # checks its arguments
    settings = {
        "budget": budget,
        "target": target,
        "rounds": rounds,
        "iterative_steps": iterative_steps,
        **allocating,
        "ignored_layers": [name for name, module in model.named_modules() if module in ignored],
        "base": base if isinstance(base, str) else type(base).__name__,
        "compensate": compensate,
        "attack": describe(attack, model),
        "epochs": epochs,
        "eps": eps,
        "seed": seed,
    }
    groups = prunable_groups(model, example_inputs, ignored)
    planner = Planner(model, example_inputs, groups, budget, least_units(groups, min_keep), round_to)
    planner.check_reachable(target)
    data = {"train_data": train_data, "calibration_data": images, "test_data": test_data}
    no_matter = ("attack", "progress", "checkpoint_every", "log")
    decisive = {name: value for name, value in training.items() if name not in no_matter}
    named = {"attacks": attacks, "train_attack": train_attack, "channels by": described(base)}
    job = plainly({**decisive, **measuring, **data, **named, **settings})
    stages = Stages(checkpoint, model, job, data.values(), keeps=(Round, Sensitivity, Evaluation, Step))

    dense = None if test_data is None else copied(model)  # timed beside the pruned one in the end

    def prepare() -> dict[str, Any]:
        return {"before": _plain(assess()), "dense": planner.whole}

    settle = partial(
        recalibrate, model, images, variances=not compensate, max_batches=max_batches, seed=seed, progress=progress
    )
    start = stages.do("dense", prepare)
    pruning = Pruning(
        model,
        example_inputs,
        importance,
        settle,
        compensate,
        source,
        groups,
        budget,
        target * start["dense"],
        alpha,
        min_keep,
        round_to,
        ignored,
        seed,
    )

    def prune(goal: float, left: int, before: Step | None) -> dict[str, Any]:
        step = pruning.step(goal, 1 / left, before)
        return asdict(replace(step, pruned=_plain(assess())) if left == 1 else step)

    before: Step | None = None
    done: list[Round] = []
    for index in range(rounds):
        goal = target ** ((index + 1) / rounds)
        made: list[Step] = []
        for left in range(iterative_steps, 0, -1):
            stage = partial(prune, goal * start["dense"], left, before)
            before = Step(**stages.do(f"round-{index + 1}-step-{len(made) + 1}", stage))
            made.append(before)
            reached = before.reached / start["dense"]
            where = f"round {index + 1} of {rounds}, step {len(made)} of {iterative_steps}"
            logger.info("%s: pruned to %.1f%% of the dense model's %s", where, 100 * reached, budget)
        record = None
        if epochs > 0:
            file = stages.file(f"round-{index + 1}-training")
            record = finetune(model, train_data, epochs=epochs, seed=seed + index, checkpoint=file, **training)
        done.append(_round(goal, reached, made, record))
    if not is_met(done[-1].reached, target):
        logger.warning("%s=%g: what was left to prune allowed %.4f", budget, target, done[-1].reached)
    evaluations = [_evaluation(start["before"]), done[-1].pruned, assess() if epochs > 0 else done[-1].pruned]
    if dense is not None:
        evaluations = _with_latencies(evaluations, dense, model, example_inputs[:1])
    unpruned, pruned, tuned = evaluations
    done[-1] = replace(done[-1], pruned=pruned)
    return Report(unpruned, tuned, tuple(done), settings)


def _round(target: float, reached: float, steps: Sequence[Step], finetuning: Finetuning | None) -> Round:
    """What the steps of a round come to."""
    first, last = steps[0], steps[-1]
    return Round(
        target,
        reached,
        Sensitivity.from_dict(first.sensitivity),
        {name: 1 - math.prod(step.kept.get(name, 1.0) for step in steps) for name in first.kept},
        {name: (before, _latest(name, steps)[1]) for name, (before, _) in first.widths.items()},
        _evaluation(last.pruned),
        finetuning,
    )


def _latest(name: str, found: Sequence[Step | Round]) -> tuple[int, int]:
    """The widths of a group before and after the last that has it; when it can lose no more, it is none."""
    return next(each.widths[name] for each in reversed(found) if name in each.widths)


def _with_latencies(
    evaluations: Sequence[Evaluation | None], dense: nn.Module, pruned: nn.Module, image: Tensor
) -> list[Evaluation | None]:
    """Of the dense, the pruned and the fine-tuned model; the latter two take the same. All timed now, in turn."""
    first = place()[0] == 0
    times = gather([measure_latency(model, image) for model in (dense, pruned)] if first else None)[0]
    triple = zip(evaluations, (times[0], times[1], times[1]), strict=True)
    return [None if each is None else replace(each, latency_ms=time) for each, time in triple]


def _plain(evaluation: Evaluation | None) -> dict[str, Any] | None:
    return None if evaluation is None else evaluation.to_dict()


def _evaluation(content: dict[str, Any] | None) -> Evaluation | None:
    return None if content is None else Evaluation.from_dict(content)


def check_options(
    *, rounds: int, iterative_steps: int, epochs: float, alpha: float, min_keep: float, round_to: int | None
) -> None:
    """Raise `InputError` unless these arguments of `mrpf` are usable."""
    check_count("rounds", rounds)
    check_count("iterative_steps", iterative_steps)
    check_number("epochs", epochs, low=0)
    check_allocation(alpha=alpha, min_keep=min_keep, round_to=round_to)
