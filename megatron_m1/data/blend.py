"""Weighted blend of several sources: which source, and which of its samples, is sample i."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from megatron.core.datasets import helpers


class Blend:
    """Deals samples so that after any number of them each source is within one of its share.

    Deterministic and free of randomness: the shuffles are in the sources.
    Raises ValueError unless every weight is a positive, finite number.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(math.isfinite(w) and w > 0 for w in weights):
            raise ValueError(f"blend weights are {list(weights)}; give one number above 0 a source")
        self._weights = np.asarray(weights, dtype=np.float64) / math.fsum(weights)
        self._deal(1024)

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, the sample's number within that source) of a sample of the run, from 0."""
        if len(self._weights) == 1:
            return 0, sample
        if sample >= len(self._source):
            self._deal(max(2 * len(self._source), sample + 1))
        return int(self._source[sample]), int(self._within[sample])

    def _deal(self, samples: int) -> None:
        # Megatron's dealing is greedy: a longer table starts with the shorter one.
        self._source = np.empty(samples, dtype=np.int16)
        self._within = np.empty(samples, dtype=np.int64)
        helpers.build_blending_indices(
            self._source, self._within, self._weights, len(self._weights), samples, False
        )
