"""The bounds of an importance weight, from the ways in which other projects write them.

Ours are absolute: a weight is clipped to [min, max], and on-policy it is 1.

    delta       [1 - low, 1 + high]   verl, slime, NeMo-RL, SkyRL, ROLL, AReaL
    cap         [0, cap]              TRL
    cap delta   [0, 1 + high]         open-instruct
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ClipRange:
    """Absolute bounds of a ratio of probabilities.

    Raises ValueError when they are no range, or on-policy tokens would be outside of it.
    """

    min: float
    max: float

    def __post_init__(self) -> None:
        if not self.max >= 1:
            raise ValueError(
                f"the upper bound of importance weights is {self.max}, which cuts the weight 1 of "
                "on-policy tokens; give an absolute bound of at least 1, as 5.0"
            )
        if not 0 <= self.min <= 1:
            raise ValueError(
                f"the lower bound of importance weights is {self.min}; give an absolute bound in "
                "[0, 1], 0 for none"
            )


def from_deltas(low: float, high: float) -> ClipRange:
    """From distances to 1: verl's and SkyRL's ``clip_ratio_low`` and ``clip_ratio_high`` or
    ``eps_clip_*``, slime's ``--eps-clip`` and ``--eps-clip-high``, NeMo-RL's ``ratio_clip_min`` and
    ``ratio_clip_max``. A ``low`` of 1 or more is no lower bound.

    Raises ValueError when either is negative or NaN.
    """
    for name, value in (("low", low), ("high", high)):
        if math.isnan(value) or value < 0:
            raise ValueError(f"the {name} distance to 1 is {value}; give a number of at least 0")
    return ClipRange(max(1 - low, 0.0), 1 + high)


def from_cap(cap: float) -> ClipRange:
    """From the largest weight itself: TRL's ``epsilon_high`` with ``loss_type="cispo"``.

    Raises ValueError for a cap below 1, as TRL's default of 0.2 is.
    """
    return ClipRange(0.0, cap)


def from_cap_delta(high: float) -> ClipRange:
    """From how far a weight may be above 1, without a lower bound: open-instruct's
    ``clip_higher``. Raises ValueError when it is negative or NaN."""
    return from_deltas(1.0, high)
