"""How far scores and their ranking would move with other calibration images: a bootstrap over blocks of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

REPLICATES = 1_000


def resampled(shares: Array, sizes: Sequence[int], *, times: int = 1, seed: int = 0) -> Array:
    """Scores of samples of blocks, drawn with replacement; the worst change of each layer is held fixed.

    Args:
        shares: (blocks, scores); a block's shares of the scores, which are the sums over the blocks.
        sizes: images of each block.
        times: how many times as many blocks to draw as there are, to see what more images would give.
        seed: of the draws.

    Returns:
        (`REPLICATES`, scores).
    """
    blocks = len(sizes)
    draws = np.random.default_rng(seed).multinomial(times * blocks, np.full(blocks, 1 / blocks), size=REPLICATES)
    scale = sum(sizes) / (draws @ np.asarray(sizes))
    return np.asarray((draws @ shares) * scale[:, None], dtype=np.float64)


def mean_rank_correlation(scores: Array, samples: Array) -> float:
    """Mean over the rows of `samples` of their rank correlation (Spearman) with `scores`; 1 for a single score.

    Args:
        scores: (scores,).
        samples: (samples, scores).
    """
    if len(scores) < 2:
        return 1.0
    own, others = _ranks(scores[None])[0], _ranks(samples)
    return float(np.mean(others @ own) / np.square(own).sum())


def _ranks(values: Array) -> Array:
    """Rank of each value within its row, less the mean rank; ties by order."""
    ranks = values.argsort(axis=1, kind="stable").argsort(axis=1)
    return np.asarray(ranks - (values.shape[1] - 1) / 2, dtype=np.float64)
