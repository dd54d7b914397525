"""Uniform numbers that depend on what is drawn for, never on when or where.

A number is a hash of the run's seed, the prompt's number, the response's number in its group and
the token's position in the response, by the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA
2014). So a response has the same draws in whichever slot, batch and layout it is generated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 2**64 - 1


def stream(seed: int, prompt_id: int, index: int) -> int:
    """The stream of one response, a 64-bit number."""
    state = 0
    for value in (seed, prompt_id, index):
        state = int(_mixed(np.array([(state ^ value) & _MASK], dtype=np.uint64))[0])
    return state


def uniforms(streams: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """The numbers of streams at positions, at least 0 and at most 1 - 2^-52."""
    counted = streams + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return (_mixed(counted) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(_GOLDEN)
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(multiplier)
    return state ^ (state >> np.uint64(31))
