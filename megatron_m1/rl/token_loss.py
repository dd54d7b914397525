"""The objective of a run, as a function of a packed row's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

from megatron_m1.rl.config import PolicyConfig
from megatron_m1.rl.objectives import summed_cispo, summed_ppo
from megatron_m1.rl.token_sums import TokenSums

Objective = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, TokenSums]]
"""(log-probabilities, old ones, advantages, weights), each [T] -> sum of losses, and metrics."""


def objective(rl: PolicyConfig, is_weight_max: float) -> Objective:
    """The objective that ``rl`` asks for, with the upper bound of this step."""
    if rl.objective == "ppo":
        return partial(summed_ppo, ratio_max=rl.ratio_max, ratio_min=rl.ratio_min)
    return partial(
        summed_cispo,
        is_weight_max=is_weight_max,
        is_weight_min=rl.is_weight_min,
        mask_max=math.inf if rl.mask_max is None else rl.mask_max,
        mask_min=rl.mask_min,
    )
