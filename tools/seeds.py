"""Statistics of training curves over seeds.

S  seeds, at least two
B  points of a curve, the same for all seeds
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last serves for more.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160),
    *(2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060),
)


def trailing_mean(curves: np.ndarray, window: int) -> np.ndarray:
    """The mean of each point and those before it, ``window`` in all, or of as many as there are.

    Args:
        curves: [..., B].
    """
    sums = np.cumsum(curves, axis=-1)
    sums[..., window:] -= sums[..., :-window]
    return sums / np.minimum(np.arange(1, curves.shape[-1] + 1), window)


def first_reaching(positions: np.ndarray, curve: np.ndarray, level: float) -> float:
    """The first position [B] at which a curve [B] is at the level or above; infinite if never."""
    reached = np.flatnonzero(curve >= level)
    return float(positions[reached[0]]) if len(reached) else math.inf


def half_interval(values: np.ndarray) -> np.ndarray:
    """Half the width of the 95 % confidence interval of a mean over seeds, by Student's t.

    Args:
        values: [S, ...]; of one seed nothing is known, and the width is infinite.
    """
    seeds = len(values)
    if seeds == 1:
        return np.full(values.shape[1:], math.inf)
    quantile = _T[min(seeds - 1, len(_T)) - 1]
    return quantile * values.std(axis=0, ddof=1) / math.sqrt(seeds)


def bootstrap_interval(
    statistic: Callable[..., float], *samples: np.ndarray, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic, which may be infinite.

    Args:
        statistic: of the samples.
        samples: [S, ...] each; their seeds are drawn again with replacement, each sample's by
            itself. Of one seed nothing is known, and the interval is infinite.
    """
    if min(map(len, samples)) == 1:
        return -math.inf, math.inf
    generator = np.random.default_rng(seed)

    def again(sample: np.ndarray) -> np.ndarray:
        return sample[generator.integers(len(sample), size=len(sample))]

    found = np.sort([statistic(*map(again, samples)) for _ in range(draws)])
    # Values that occurred, since what lies between a number and infinity is no number.
    return float(found[math.floor(0.025 * draws)]), float(found[math.ceil(0.975 * draws) - 1])
