"""Module Robustness Sensitivity of a model: the result, its groups' scores, and how sure they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ._version import versions
from .errors import InputError, check_choice, check_count, check_number
from .estimators import SMALLEST_BLOCK
from .files import read_json, write_json
from .uncertainty import Array, mean_rank_correlation, resampled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Score = Literal["modules", "groups", "typical"]
FORMAT = "tp_mrs.sensitivity/4"

FEWEST_BLOCKS = 8
"""With fewer blocks, nothing is said of uncertainty."""

STABLE = 0.95
"""The rank correlation from which a ranking counts as stable."""


@dataclass(frozen=True)
class Sensitivity:
    """How much robust loss the worst small change of each module, and of each coupled group, costs.

    Attributes:
        modules: name of each convolutional or linear layer → its sensitivity MRS_i, in nats of cross-entropy.
        members: name of each coupled group (its root layer's) → its layers, those whose outputs are pruned and those
            whose inputs go with them.
        sizes: name of each layer → number of weights.
        robust_loss: mean cross-entropy on the attacked images, in nats.
        robust_accuracy: fraction of the attacked images classified correctly.
        blocks: number of images in each block that the calibration images were split into.
        shares: name of each layer → each block's share of its sensitivity; they add up to it.
        units: name of each group → the sensitivity T_u of each of its units (channels that go together), between 0 and
            about 1. The slope of an image's loss ℓ as the unit fades is Σ a ∂ℓ/∂a over its values a where layers read
            them. T_u is its root mean square over the attacked images, the slopes of each image divided by their norm
            over all that its layers read: each image counts alike, however high its loss. Pruning ratios are set by
            this, and the channels chosen.
        together: name of each group → the cost of the worst change of all its layers at once, each in its own ball, in
            nats; empty unless it was asked for.
        settings: how it was measured.
        versions: of the packages that it was measured with.
    """

    modules: Mapping[str, float]
    members: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]
    robust_loss: float
    robust_accuracy: float
    blocks: tuple[int, ...]
    shares: Mapping[str, tuple[float, ...]]
    units: Mapping[str, tuple[float, ...]]
    together: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def images(self) -> int:
        """Number of calibration images."""
        return sum(self.blocks)

    @cached_property
    def groups(self) -> dict[str, float]:
        """Name of each group → MRS_g, the sum over its layers, in nats."""
        return self._by_group("groups", self._scores())

    @cached_property
    def typical(self) -> dict[str, float]:
        """Name of each group → what a random change of the same size costs instead of the worst one, in nats.

        To first order and as a root mean square: √(Σ MRS_i² / weights of layer i).
        """
        return self._by_group("typical", self._scores())

    @property
    def has_intervals(self) -> bool:
        """Whether there were enough images for `intervals`."""
        return len(self.blocks) >= FEWEST_BLOCKS

    def intervals(self, of: Score = "typical", *, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Where the scores lie, had other images of the same kind been drawn: percentiles of a bootstrap over blocks.

        The worst changes are held fixed, so this is a little too narrow where few images decide their direction.

        Args:
            of: `"modules"`, `"groups"` or `"typical"`.
            level: of confidence.

        Raises:
            InputError: an argument is unusable, or there are too few images to tell.
        """
        check_choice("of", of, get_args(Score))
        check_number("level", level, low=0, high=1)
        samples = self._resampled(of)
        ends = np.percentile(samples, [50 * (1 - level), 50 * (1 + level)], axis=0).T.tolist()
        return {name: (low, high) for name, (low, high) in zip(self._names(of), ends, strict=True)}

    def rank_stability(self, *, times: int = 1) -> float:
        """Mean rank correlation of the groups' ranking by `typical` with those of bootstrap samples; 1 is stable.

        Args:
            times: how many times as many images to imagine.

        Raises:
            InputError: `times` is below 1, or there are too few images to tell.
        """
        check_count("times", times)
        return mean_rank_correlation(np.array(list(self.typical.values())), self._resampled("typical", times=times))

    def images_for_stable_ranking(self) -> int | None:
        """About how many images would bring `rank_stability` to 0.95; None beyond 64 times as many.

        Raises `InputError` if there are too few images to tell.
        """
        for times in (1, 2, 4, 8, 16, 32, 64):
            if self.rank_stability(times=times) >= STABLE:
                return times * self.images
        return None

    def __str__(self) -> str:
        intervals = self.intervals() if self.has_intervals else {}
        width = max([len(name) for name in self.groups] + [len("group")])
        top = max(self.typical.values(), default=0.0) or 1.0
        lines = [
            f"Module Robustness Sensitivity on {self.images} images: "
            f"robust accuracy {self.robust_accuracy:.1%}, robust loss {self.robust_loss:.3f}",
            f"{'group':<{width}}  layers  {'MRS':>9}  {'typical':>9}" + ("  95% interval     " if intervals else ""),
        ]
        for name in sorted(self.groups, key=lambda name: -self.typical[name]):
            bar = "█" * round(20 * self.typical[name] / top)
            numbers = f"{len(self.members[name]):>6}  {self.groups[name]:>9.3g}  {self.typical[name]:>9.3g}"
            if intervals:
                numbers += "  {:>8.3g}–{:<8.3g}".format(*intervals[name])
            lines.append(f"{name:<{width}}  {numbers}  {bar}".rstrip())
        return "\n".join([*lines, *self.doubts()])

    def doubts(self) -> list[str]:
        """A sentence if the ranking might be another one with other images."""
        if not self.has_intervals:
            return [f"Too few images to say how stable this is; use at least {FEWEST_BLOCKS * SMALLEST_BLOCK}."]
        stability = self.rank_stability()
        if stability >= STABLE:
            return []
        enough = self.images_for_stable_ranking()
        remedy = f"about {enough} images would settle it" if enough else "it would take far more images to settle it"
        return [
            f"The ranking is not stable yet (rank correlation {stability:.2f} between samples of images): {remedy}."
        ]

    # scores as arrays, (…, modules) and (…, groups)

    def _scores(self) -> Array:
        return np.array(list(self.modules.values()))

    def _resampled(self, of: Score, *, times: int = 1) -> Array:
        """(bootstrap samples, modules or groups); raises `InputError` if there are too few images."""
        if not self.has_intervals:
            raise InputError(
                f"data: {self.images} calibration images are too few to tell how sure this is; "
                f"use at least {FEWEST_BLOCKS * SMALLEST_BLOCK}"
            )
        shares = np.array([self.shares[name] for name in self.modules]).T
        samples = resampled(shares, self.blocks, times=times).clip(min=0.0)  # no maximum over a ball is negative
        return samples if of == "modules" else np.stack(list(self._by_group(of, samples).values()), axis=-1)

    def _names(self, of: Score) -> list[str]:
        return list(self.modules if of == "modules" else self.members)

    def _by_group(self, of: Score, scores: Any) -> dict[str, Any]:
        """Combine the modules' scores over each group."""
        column = {name: index for index, name in enumerate(self.modules)}
        found = {}
        for group, layers in self.members.items():
            columns = [column[layer] for layer in layers if layer in column]
            sizes = np.array([self.sizes[layer] for layer in layers if layer in column], dtype=np.float64)
            found[group] = combined(scores[..., columns], sizes, typical=of == "typical")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, the groups' scores too, in plain types."""
        return {**asdict(self), "groups": self.groups, "typical": self.typical}

    def save(self, path: str | Path) -> Path:
        """Write `to_dict()` as JSON. Raises `InputError` if the file cannot be written."""
        return write_json(path, {"format": FORMAT, **self.to_dict()})

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `save` wrote. Raises `InputError` if the file holds something else."""
        try:
            return cls.from_dict(read_json(path, FORMAT))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"path: {path} lacks parts of a sensitivity ({error})") from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Sensitivity:
        """What `to_dict` gave."""
        content = {key: value for key, value in content.items() if key not in ("format", "groups", "typical")}
        for key in ("members", "shares", "units"):
            content[key] = {name: tuple(values) for name, values in content[key].items()}
        content["blocks"] = tuple(content["blocks"])
        return cls(**content)

    def plot(self, ratios: Mapping[str, float] | None = None) -> Figure:
        """A matplotlib figure of the groups' sensitivities, and of the pruning ratios if they are given."""
        from .plotting import plot_sensitivity

        return plot_sensitivity(self, ratios)


def combined(scores: Array, sizes: Array, *, typical: bool) -> Array:
    """The score of a group from those of its layers, (…, layers) and (layers,): their sum, or the typical one.

    A random direction in n dimensions meets the gradient with a root mean square of 1/√n of its length, where the worst
    one meets all of it; and what independent changes cost adds up in squares. Pruning takes away the weakest channels,
    which is nearer to a random change than to the worst.
    """
    return np.sqrt((np.square(scores) / sizes).sum(axis=-1)) if typical else scores.sum(axis=-1)
