"""Is MRS right, how right, and what does it cost? Estimators against references, group scores against real damage.

    python -m benchmarks.sensitivity                          # all parts that have no result yet
    python -m benchmarks.sensitivity --parts truth speed      # some of them, anew
    python -m benchmarks.sensitivity --data-dir DIR           # CIFAR-10 too
    python -m benchmarks.sensitivity --report                 # tables and plot from the results

Parts: `references`, layers' scores by RiFT's procedure and a converged maximiser, which takes longest; `truth`, ours
beside them; `speed`, against RiFT's; `scaling`, from resnet18 to resnet101; `memory`, beside a training step's;
`damage`, groups' scores against what pruning really costs; `allocation`, what ratios should go by; `images`, how many;
`units`, a sensitivity with all its channels, from which docs/picture.py draws.
Each network or seed is a file in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchattacks
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.contenders import MeasuredBefore
from benchmarks.networks import EPS, NETWORKS, dense
from benchmarks.references import converged, mean_loss, rift
from benchmarks.tables import RESULTS, fill, markdown, provenance
from tp_mrs import Sensitivity, allocate, create_model, measure_sensitivity, recalibrate
from tp_mrs.attacks import named_attack, parse_eps
from tp_mrs.data import ImageData, load_data, make_loader, random_subset
from tp_mrs.estimators import RobustLoss, first_order, projected_gradient_ascent
from tp_mrs.files import read_json, write_json
from tp_mrs.importance import BaseName, MRSImportance
from tp_mrs.measuring import measure, measured_weights
from tp_mrs.numerics import Precision
from tp_mrs.pruning import prunable_groups, prune_by_ratio
from tp_mrs.sensitivity import FEWEST_BLOCKS, combined
from tp_mrs.uncertainty import Array

FORMAT = "tp_mrs.sensitivity_benchmark/1"
EPSILON = 0.1
ASCENTS = (1, 2, 3, 5, 8)

Batches = list[tuple[Tensor, Tensor]]


def images_of(data: ImageData, count: int, *, split: str = "calibration", skip: int = 0) -> tuple[Tensor, Tensor]:
    """The first images of a fixed random order, in one batch."""
    chosen = random_subset(getattr(data, split), skip + count, seed=0)
    images, labels = next(iter(make_loader(chosen, batch_size=skip + count)))
    return images[skip:], labels[skip:]


def attacked(model: nn.Module, data: ImageData, batch: tuple[Tensor, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """The images after PGD on the model."""
    torch.manual_seed(0)
    attack = named_attack(f"pgd-{steps}", eps=parse_eps(EPS[data.name]))(model.eval())
    return attack(*batch).detach(), batch[1]


def correlation(ours: Sequence[float] | Array, theirs: Sequence[float] | Array) -> float:
    """Spearman's, rounded."""
    return round(float(spearmanr(ours, theirs).statistic), 3)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = run()
    return time.perf_counter() - start, value


class Estimates:
    """Our estimators on one network and one set of adversarial images, as `measure` uses them."""

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor], precision: Precision = "fp32") -> None:
        self.model = model.eval().requires_grad_(True)
        self.weights, _ = measured_weights(model)
        self.loss = RobustLoss(model, [batch], precision=precision)

    def first_order(self) -> dict[str, float]:
        self.base, shares = first_order(self.loss, self.weights, EPSILON)
        self.gradients = {name: weight.grad for name, weight in self.weights.items()}
        return {name: float(share.sum()) for name, share in shares.items()}

    def ascent(self, layers: list[str], steps: int) -> float:
        """Of these layers together; after `first_order`."""
        gradients = [gradient for name in layers if (gradient := self.gradients[name]) is not None]
        weights = [self.weights[name] for name in layers]
        found = projected_gradient_ascent(self.loss, weights, gradients, base=self.base, epsilon=EPSILON, steps=steps)
        return float(found.sum())

    def ascents(self, steps: int) -> dict[str, float]:
        return {name: self.ascent([name], steps) for name in self.weights}


# --- truth: estimators against a converged maximiser and RiFT ------------------------------------------------------


IMAGES = 128


def robust_network(seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A small robust network, and the adversarial images on which its layers are measured."""
    data = load_data("digits")
    model = dense(data, "narrow resnet18", seed=seed)
    return model, attacked(model, data, images_of(data, IMAGES), 10)


def references(seed: int) -> dict[str, Any]:
    """All layers by RiFT's procedure and by the converged maximiser."""
    model, batch = robust_network(seed)
    layers = list(measured_weights(model)[0])
    scores = {
        "rift": {layer: rift(model, layer, [batch]) for layer in layers},
        "converged": {layer: converged(model, layer, [batch]) for layer in layers},
    }
    return {"seed": seed, "images": IMAGES, "scores": scores}


def truth(seed: int) -> dict[str, Any]:
    """All layers by each of our estimators."""
    model, batch = robust_network(seed)
    scores: dict[str, dict[str, float]] = {}
    precisions: dict[Precision, str] = {"fp32": "", "bf16": ", bf16"}
    for precision, suffix in precisions.items():
        ours = Estimates(model, batch, precision)
        scores[f"first_order{suffix}"] = ours.first_order()
        for steps in ASCENTS:
            scores[f"pga-{steps}{suffix}"] = ours.ascents(steps)
    return {"seed": seed, "images": IMAGES, "scores": scores}


# --- speed, scaling, memory ------------------------------------------------------------------------------------------


def random_batch(count: int, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, size, size, generator=generator), torch.randint(10, (count,), generator=generator)


def speed() -> dict[str, Any]:
    """resnet18 of full width: `first_order` and `pga` against RiFT's procedure, adversarial images given.

    Layer after layer all take their turns, so that a busy moment meets all of them. What `pga` starts from counts.
    """
    torch.manual_seed(0)
    model, batch = create_model("resnet18", num_classes=10, image_size=32).eval(), random_batch(64)
    ours = {
        "fp32": Estimates(copy.deepcopy(model), batch),
        "bf16": Estimates(copy.deepcopy(model).to(memory_format=torch.channels_last), batch, "bf16"),
    }
    layers = list(ours["fp32"].weights)
    first: dict[str, list[float]] = {precision: [] for precision in ours}
    theirs, ascents = 0.0, dict.fromkeys(itertools.product(FASTEST, ours), 0.0)
    for estimates in ours.values():  # warms up, and bf16 compiles its kernels
        estimates.first_order()
        estimates.ascent(layers[:1], 2)
    for layer in layers:
        theirs += seconds(partial(rift, model, layer, [batch]))[0]
        for precision, estimates in ours.items():
            first[precision].append(seconds(estimates.first_order)[0])
            for steps in FASTEST:
                ascents[steps, precision] += seconds(partial(estimates.ascent, [layer], steps))[0]
    taken = {f"first_order, {precision}": statistics.median(times) for precision, times in first.items()}
    taken |= {f"pga-{k}, {p}": taken[f"first_order, {p}"] + time for (k, p), time in ascents.items()}
    return {
        "images": len(batch[0]),
        "layers": len(layers),
        "seconds": {"rift": round(theirs, 2), **{label: round(time, 3) for label, time in taken.items()}},
        "times_faster": {label: round(theirs / time, 1) for label, time in taken.items()},
    }


FASTEST = (2, 3, 5, 8)
"""Steps of the ascents that are timed."""


def scaling() -> dict[str, Any]:
    """How `first_order` grows with depth, beside one pass forward and backward."""
    batch = random_batch(32)
    found: dict[str, dict[str, float]] = {}
    for name in ("resnet18", "resnet101"):
        torch.manual_seed(0)
        model = create_model(name, num_classes=10, image_size=32).eval()

        def plain(model: nn.Module = model) -> None:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(batch[0]), batch[1]).backward()

        ours = partial(measure, model, [batch], torchattacks.VANILA, progress=False)
        pairs = [(seconds(ours)[0], seconds(plain)[0]) for _ in range(5)][1:]
        found[name] = {
            "first_order": round(statistics.median(ours for ours, _ in pairs), 3),
            "forward and backward": round(statistics.median(theirs for _, theirs in pairs), 3),
            "ratio": round(statistics.median(ours / theirs for ours, theirs in pairs), 3),
        }
    growth = found["resnet101"]["ratio"] / found["resnet18"]["ratio"]
    return {"images": len(batch[0]), "networks": found, "growth": round(growth, 3)}


def memory() -> dict[str, Any]:
    """Peak memory of a process that measures, and of one that trains, on the same batches of 64."""
    peaks = {
        what: int(
            subprocess.run(
                [sys.executable, "-m", "benchmarks.sensitivity", "--peak", what], capture_output=True, check=True
            ).stdout
        )
        for what in ("nothing", "training", "first_order", "pga")
    }
    idle = peaks.pop("nothing")
    used = {what: peak - idle for what, peak in peaks.items()}
    return {
        "batch_size": 64,
        "megabytes": {what: round(kilobytes / 1024) for what, kilobytes in used.items()},
        "ratio": {what: round(used[what] / used["training"], 2) for what in ("first_order", "pga")},
    }


def peak(what: str) -> int:
    """Peak resident memory of this process, in kilobytes, once it has done that; on Linux.

    The peak that `resource` tells is the parent's, where that is higher.
    """
    torch.manual_seed(0)
    model, batches = create_model("resnet18", num_classes=10, image_size=32), [random_batch(64) for _ in range(2)]
    if what == "training":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    elif what != "nothing":
        measure(model, batches, torchattacks.VANILA, estimator=what, steps=2, progress=False)  # type: ignore[arg-type]
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


# --- damage: groups' scores against what pruning costs --------------------------------------------------------------

RATIOS, RECALIBRATED = (0.1, 0.3, 0.5), 0.3


def damage(data_name: str, folder: str | None, name: str) -> dict[str, Any]:
    """For each group: its scores, and the robust loss that losing 10, 30 and 50% of its channels costs.

    Channels go by Taylor importance on the adversarial loss. The pruned network is attacked anew, by PGD-3 on test
    images. Beside the scores stands what losing 30% costs on the attacked calibration images as they are.
    """
    data = load_data(data_name, folder)
    model = dense(data, name).to(memory_format=torch.channels_last)
    calibration, test = images_of(data, 256), images_of(data, 256, split="test")
    batch = attacked(model, data, calibration, 10)
    groups = prunable_groups(model, calibration[0][:1])
    ours = Estimates(model, batch)
    modules = {"first_order": ours.first_order(), "pga": ours.ascents(3)}
    members = {group.name: [layer for layer in group.layers if layer in ours.weights] for group in groups}
    sizes = {layer: weight.numel() for layer, weight in ours.weights.items()}
    together = {group: ours.ascent(layers, 3) for group, layers in members.items()}
    pruned_by = Pruning(model, calibration, data, "taylor")
    before, robust_loss = losses_under_attack(model, data, test), mean_loss(model, [batch])
    costs: dict[str, dict[str, dict[str, list[float]]]] = {}
    direct = {}
    for ratio in RATIOS:
        for group in members:
            pruned = pruned_by({group: ratio})
            found = {"as it was": losses_under_attack(pruned, data, test)}
            if ratio == RECALIBRATED:
                direct[group] = mean_loss(pruned, [batch]) - robust_loss
                found["recalibrated"] = losses_under_attack(recalibrate(pruned, [calibration]), data, test)
            costs.setdefault(f"{ratio:g}", {})[group] = {
                how: [round(float(part.mean()), 5) for part in halves(losses - before)] for how, losses in found.items()
            }
    return {
        "data": data.name,
        "network": name,
        **NETWORKS[data.name, name],
        "calibration_images": len(calibration[0]),
        "test_images": len(test[0]),
        "dense_loss": round(float(before.mean()), 5),
        "members": members,
        "sizes": sizes,
        "modules": modules,
        "together": together,
        "weaker_half": weaker_halves(pruned_by.sensitivity),
        "direct": direct,
        "costs": costs,
    }


class Pruning:
    """Prunes copies of a network by ratios; `base` says which channels of a group are the weakest."""

    def __init__(
        self, model: nn.Module, calibration: tuple[Tensor, Tensor], data: ImageData, base: BaseName = "sensitivity"
    ) -> None:
        self.model, self.calibration, self.base = model, calibration, base
        self.attack = named_attack("pgd-10", eps=parse_eps(EPS[data.name]))
        importance = MRSImportance(model, [calibration], self.attack, alpha=0.0, channels_last=True, progress=False)
        self.measurement, self.example = importance.measurement(), calibration[0][:1]
        self.sensitivity = importance.sensitivity(self.example)

    def __call__(self, ratios: Mapping[str, float]) -> nn.Module:
        """A pruned copy; ratios by the names of the groups."""
        pruned = copy.deepcopy(self.model)
        importance = MeasuredBefore(pruned, [self.calibration], self.attack, base=self.base, alpha=0.0)
        importance.shared = self.measurement
        prune_by_ratio(pruned, self.example, {pruned.get_submodule(name): r for name, r in ratios.items()}, importance)
        return pruned.to(memory_format=torch.channels_last)


def weaker_halves(sensitivity: Sensitivity) -> dict[str, float]:
    """Group → √(Σ T_u²) over the half of its units for which it is smallest: what losing them costs to first order."""
    return {
        name: math.sqrt(math.fsum(unit**2 for unit in sorted(units)[: max(1, len(units) // 2)]))
        for name, units in sensitivity.units.items()
    }


def losses_under_attack(model: nn.Module, data: ImageData, test: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each test image, attacked by PGD-3: (N,)."""
    images, labels = attacked(model, data, test, 3)
    with torch.no_grad():
        return F.cross_entropy(model(images), labels, reduction="none")


def halves(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Every other image, and those between."""
    return losses[::2], losses[1::2]


def group_scores(result: dict[str, Any]) -> dict[str, list[float]]:
    """Ways to make a group's score from its layers', for all groups of a network."""
    members, sizes = result["members"], result["sizes"]

    def each(estimator: str, how: Callable[[list[float], list[int]], float]) -> list[float]:
        scores = result["modules"][estimator]
        return [how([scores[n] for n in layers], [sizes[n] for n in layers]) for layers in members.values()]

    def typical(scores: list[float], weights: list[int]) -> float:
        return float(combined(np.array(scores), np.array(weights, dtype=float), typical=True))

    return {
        "largest layer": each("first_order", lambda scores, _: max(scores)),
        "sum": each("first_order", lambda scores, _: sum(scores)),
        "sum, pga": each("pga", lambda scores, _: sum(scores)),
        "together, pga": list(result["together"].values()),
        "together / √weights, pga": [
            score / sum(sizes[n] for n in members[group]) ** 0.5 for group, score in result["together"].items()
        ],
        "typical": each("first_order", typical),
        "typical, pga": each("pga", typical),
        "weaker half": list(result["weaker_half"].values()),
        "removal, tried": list(result["direct"].values()),
    }


def damage_correlations(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Score → what was done → rank correlation with the robust loss that this costs.

    The last row is how far the cost on one half of the test images tells that on the other.
    """
    costs = {
        ratio if how == "as it was" else how: np.array([by_group[group][how] for group in result["members"]])
        for ratio, by_group in result["costs"].items()
        for how in next(iter(by_group.values()))
    }
    scores = group_scores(result)
    found = {
        label: {done: correlation(score, cost.mean(axis=1)) for done, cost in costs.items()}
        for label, score in scores.items()
    }
    return {**found, "one half by the other": {done: correlation(*cost.T) for done, cost in costs.items()}}


# --- allocation: what ratios should go by ----------------------------------------------------------------------------

ALPHAS, BUDGETS = (0.5, 1.0), (0.5, 0.25)


def allocation(data_name: str, folder: str | None, name: str) -> dict[str, Any]:
    """Robust accuracy of the network at half and a quarter of its MACs, BatchNorm recalibrated.

    For the sensitivities of channels, which `allocate` goes by, and scores of groups, each with several exponents;
    `"removal, tried"` is what losing 30% of a group costs.
    """
    data = load_data(data_name, folder)
    model = dense(data, name).to(memory_format=torch.channels_last)
    calibration, test = images_of(data, 512), images_of(data, 500, split="test")
    batch = attacked(model, data, calibration, 10)
    pruned_by = Pruning(model, calibration, data)
    sensitivity = pruned_by.sensitivity
    before = mean_loss(model, [batch])
    removal = {
        group: max(mean_loss(pruned_by({group: RECALIBRATED}), [batch]) - before, 1e-4) for group in sensitivity.groups
    }
    scores = {
        "typical": sensitivity.typical,
        "sum": sensitivity.groups,
        "weaker half": weaker_halves(sensitivity),
        "removal, tried": removal,
    }
    tries = [("uniform", 0.0), *itertools.product(["channels", *scores], ALPHAS)]
    rows: dict[str, dict[str, float]] = {}
    for budget in BUDGETS:
        for label, exponent in tries:
            ratios = allocate(model, pruned_by.example, scores.get(label, sensitivity), macs=budget, alpha=exponent)
            names = {module: name for name, module in model.named_modules()}
            pruned = pruned_by({names[module]: ratio for module, ratio in ratios.items()})
            images, labels = attacked(recalibrate(pruned, [calibration], progress=False), data, test, 3)
            with torch.no_grad():
                accuracy = float((pruned(images).argmax(1) == labels).float().mean())
            key = label if label == "uniform" else f"{label}, α = {exponent:g}"
            rows.setdefault(key, {})[f"{budget:g}"] = round(accuracy, 4)
    return {"data": data.name, "network": name, "test_images": len(test[0]), "rows": rows}


# --- images: how many it takes ----------------------------------------------------------------------------------------


def images(data_name: str, folder: str | None, name: str) -> dict[str, Any]:
    """The groups' ranking from disjoint sets of images: how alike it is, and how alike each set says it would be."""
    data = load_data(data_name, folder)
    model = dense(data, name)
    attack = named_attack("pgd-10", eps=parse_eps(EPS[data.name]))
    rows = []
    for count in (32, 64, 128, 256, 512):
        sets = min(4, len(data.calibration) // count)  # type: ignore[arg-type]
        found = []
        for index in range(sets):
            batch = images_of(data, count, skip=index * count)
            measurement = measure(model, [batch], attack, channels_last=True, progress=False)
            found.append(measurement.sensitivity(prunable_groups(model, batch[0][:1])))
        rankings = [list(each.typical.values()) for each in found]
        pairs = [correlation(one, other) for one, other in itertools.combinations(rankings, 2)]
        rows.append(
            {
                "images": count,
                "sets": sets,
                "between sets": round(statistics.mean(pairs), 3),
                "bootstrap": round(statistics.mean(each.rank_stability() for each in found), 3)
                if len(found[0].blocks) >= FEWEST_BLOCKS
                else None,
            }
        )
    return {"data": data.name, "network": name, "rows": rows}


# --- units: a sensitivity to look at ----------------------------------------------------------------------------------


def units(data_name: str, folder: str | None, name: str) -> Sensitivity:
    """The network's sensitivity, channel by channel."""
    data = load_data(data_name, folder)
    batch = images_of(data, 512)
    attack = named_attack("pgd-10", eps=parse_eps(EPS[data.name]))
    return measure_sensitivity(dense(data, name), [batch], attack, example_inputs=batch[0][:1], progress=False)


# --- running and reporting -------------------------------------------------------------------------------------------


def cells(folders: dict[str, str | None]) -> Iterator[tuple[str, str, Callable[[], dict[str, Any] | Sensitivity]]]:
    """Part, file name and function of everything there is to do, with the data at hand."""
    for seed in range(3):
        yield "references", f"references-{seed}", partial(references, seed)
        yield "truth", f"truth-{seed}", partial(truth, seed)
    yield "speed", "speed", speed
    yield "scaling", "scaling", scaling
    yield "memory", "memory", memory
    yield "units", "digits-resnet18", partial(units, "digits", None, "resnet18")
    for data, name in NETWORKS:
        if data in folders and not name.startswith("narrow"):
            if name == "resnet18":
                yield "images", f"images-{data}", partial(images, data, folders[data], name)
            yield "damage", f"damage-{data}-{name}", partial(damage, data, folders[data], name)
            yield "allocation", f"allocation-{data}-{name}", partial(allocation, data, folders[data], name)


def path_of(file: str) -> Path:
    return RESULTS / f"sensitivity-{file}.json"


def results(part: str) -> list[dict[str, Any]]:
    """What there is of a part."""
    return [read_json(path, FORMAT) for path in sorted(RESULTS.glob(f"sensitivity-{part}*.json"))]


def report() -> str:
    """All tables."""
    tables = [truth_table(), speed_table(), damage_table(), allocation_table(), images_table()]
    return "\n\n".join(table for table in tables if table)


def layer_scores() -> list[dict[str, dict[str, float]]]:
    """For each seed: estimator or reference → layer → score."""
    ours = {run["seed"]: run["scores"] for run in results("truth")}
    theirs = {run["seed"]: run["scores"] for run in results("references")}
    return [{**ours[seed], **theirs[seed]} for seed in sorted(ours.keys() & theirs.keys())]


def highest(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Layer → the largest increase that anything found in full precision; what is reached is no overestimate."""
    exact = [each for name, each in scores.items() if "first_order" not in name and "bf16" not in name]
    return {layer: max(each[layer] for each in exact) for layer in exact[0]}


def truth_table() -> str:
    seeds = layer_scores()
    if not seeds:
        return ""
    text = (
        f"**Layers.** resnet18 of widths 16–128, adversarially trained on digits, {IMAGES} images, "
        f"{len(seeds)} seeds: rank correlation over all layers with the highest increase that anything found, for each "
        "seed; the smallest ratio to it, and to RiFT's value, of any layer; in brackets the median."
    )
    rows = []
    for name in [name for name in seeds[0] if name != "converged"]:
        ranks, ratios, over = [], [], []
        for scores in seeds:
            best, mine, theirs = highest(scores), scores[name], scores["rift"]
            ranks.append(f"{correlation(list(mine.values()), list(best.values())):.2f}")
            ratios += [mine[layer] / best[layer] for layer in best]
            over += [mine[layer] / theirs[layer] for layer in best if theirs[layer] > 0]
        columns = (f"{min(values):.2f} ({statistics.median(values):.2f})" for values in (ratios, over))
        rows.append([name, " ".join(ranks), *columns])
    header = ["estimator", "rank correlation", "over highest", "over RiFT's"]
    return f"{text}\n\n{markdown(header, rows)}"


def speed_table() -> str:
    lines = []
    for run in results("speed"):
        names = dict.fromkeys(label.split(", ")[0] for label in run["times_faster"])
        rows = [[name, *(f"{run['times_faster'][f'{name}, {p}']:.3g}" for p in ("fp32", "bf16"))] for name in names]
        lines.append(
            f"**Speed.** resnet18 of full width, {run['layers']} layers, {run['images']} images of 32×32, adversarial "
            f"images given, on {run['device']}: times faster than RiFT's procedure in fp32; bf16 is in channels_last."
            "\n\n" + markdown(["estimator", "fp32", "bf16"], rows)
        )
    for run in results("scaling"):
        ratios = ", ".join(f"{name} {found['ratio']:.2f}" for name, found in run["networks"].items())
        lines.append(
            f"**Depth.** Time of `first_order` over a pass forward and backward, {run['images']} images: {ratios}."
        )
    for run in results("memory"):
        ratios = ", ".join(f"`{name}` {ratio:.2f}" for name, ratio in run["ratio"].items())
        lines.append(
            f"**Memory.** Peak over a training step's, resnet18, batches of {run['batch_size']}: {ratios} "
            f"({run['megabytes']['training']} MB)."
        )
    return "\n\n".join(lines)


def damage_table() -> str:
    found = results("damage")
    if not found:
        return ""
    text = (
        "**Groups.** Rank correlation of groups' scores with the robust loss (test images attacked anew) that losing "
        f"10 / 30 / 50% of a group's channels costs; {found[0]['calibration_images']} calibration and "
        f'{found[0]["test_images"]} test images. In brackets: BatchNorm recalibrated, 30%. "Removal, tried" is what '
        "losing 30% costs on the attacked calibration images; the last row shows how much of the rest is noise."
    )
    correlations = [damage_correlations(run) for run in found]
    rows = []
    for label in correlations[0]:
        row = [label]
        for own in correlations:
            ranks = [f"{rank:.2f}" for done, rank in own[label].items() if done != "recalibrated"]
            row.append(f"{' / '.join(ranks)} ({own[label]['recalibrated']:.2f})")
        rows.append(row)
    return f"{text}\n\n{markdown(['score', *map(network_of, found)], rows)}"


def allocation_table() -> str:
    found = results("allocation")
    if not found:
        return ""
    text = (
        f"**Allocation.** Robust accuracy (PGD-3, {found[0]['test_images']} test images, %) at "
        f"{' / '.join(f'{100 * budget:.0f}' for budget in BUDGETS)}% of the MACs by `allocate`, by the score that "
        "ratios go by; BatchNorm recalibrated, no fine-tuning."
    )
    rows = [
        [label, *(" / ".join(f"{100 * accuracy:.1f}" for accuracy in run["rows"][label].values()) for run in found)]
        for label in found[0]["rows"]
    ]
    return f"{text}\n\n{markdown(['ratios by', *map(network_of, found)], rows)}"


def images_table() -> str:
    found = results("images")
    if not found:
        return ""
    text = (
        "**Images.** Rank correlation of the groups' typical sensitivities between disjoint sets of images, and what "
        "the bootstrap within a set says it is."
    )
    header = ["images", *(column for run in found for column in (f"{run['data']}, between sets", "bootstrap"))]
    rows = []
    for counts in zip(*(run["rows"] for run in found), strict=False):
        values = [each[column] for each in counts for column in ("between sets", "bootstrap")]
        rows.append([str(counts[0]["images"]), *("–" if value is None else f"{value:.2f}" for value in values)])
    return f"{text}\n\n{markdown(header, rows)}"


def network_of(run: dict[str, Any]) -> str:
    return f"{run['data']}, {run['network']}"


def plot(path: Path) -> None:
    """Scores against damage for each network, and estimators against the maximum for each layer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    networks, seeds = results("damage"), layer_scores()
    if not networks or not seeds:
        return
    columns = math.ceil((1 + len(networks)) / 2)
    figure = Figure(figsize=(3.4 * columns, 6.4), layout="constrained")
    axes = list(figure.subplots(2, columns).flat)
    for axis in axes[1 + len(networks) :]:
        axis.remove()
    estimators = {"rift": ("#999999", "v"), "first_order": ("#0072B2", "o"), "pga-5": ("#D55E00", "^")}
    for name, (colour, marker) in estimators.items():
        points = [(value, scores[name][layer]) for scores in seeds for layer, value in highest(scores).items()]
        axes[0].loglog(*zip(*points, strict=True), marker, color=colour, label=name, markersize=3.5, alpha=0.8)
    ends = axes[0].get_xlim()
    axes[0].plot(ends, ends, color="black", linewidth=0.7)
    axes[0].set(title="layers, digits", xlabel="highest found by any (nats)", ylabel="estimate (nats)")
    for axis, run in zip(axes[1:], networks, strict=False):
        costs = [statistics.mean(run["costs"]["0.3"][group]["as it was"]) for group in run["members"]]
        ranks = damage_correlations(run)
        for name, (colour, marker) in {"typical": ("#009E73", "o"), "weaker half": ("#CC79A7", "^")}.items():
            shown = np.array(group_scores(run)[name])
            shown = (shown / shown.max()).clip(min=1e-5)  # a score may be 0
            axis.plot(shown, costs, marker, color=colour, markersize=4, label=f"{name}: {ranks[name]['0.3']:.2f}")
        axis.set_xscale("log")
        axis.set_xlim(10 ** np.floor(np.log10(axis.get_xlim()[0])), 2)
        axis.xaxis.set_minor_formatter(NullFormatter())  # they would overlap
        axis.set_yscale("symlog", linthresh=0.01)
        axis.set_ylim(min(-0.01, 1.5 * min(costs)), 6 * max(costs))
        axis.set(title=network_of(run), xlabel="score / largest score", ylabel="robust loss for 30% (nats)")
    for axis in axes[: 1 + len(networks)]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize("medium")
        axis.legend(frameon=False, fontsize="small", loc="upper left", handletextpad=0.2)
        axis.grid(alpha=0.25)
    axes[0].set_ylim(top=100)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("references", "truth", "speed", "scaling", "memory", "damage", "allocation", "images", "units")
    parser.add_argument("--parts", nargs="+", choices=parts, help="run these, anew")
    parser.add_argument("--data-dir", help="folder with CIFAR-10; without it, digits only")
    parser.add_argument("--report", action="store_true", help="write the tables and the plot only")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # what a process of its own is asked
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(arguments.peak))
        return
    RESULTS.mkdir(exist_ok=True)
    folders: dict[str, str | None] = {"digits": None}
    if arguments.data_dir is not None:
        folders["cifar10"] = arguments.data_dir
    for part, file, run in cells(folders):
        wanted = part in arguments.parts if arguments.parts else not path_of(file).exists()
        if wanted and not arguments.report:
            taken, result = seconds(run)
            if isinstance(result, Sensitivity):
                result.save(path_of(file))
            else:
                write_json(path_of(file), {"format": FORMAT, **provenance(), **result})
            print(f"{file}: {taken:.0f} s", flush=True)
    fill("sensitivity", report())
    plot(RESULTS / "sensitivity.png")


if __name__ == "__main__":
    main()
