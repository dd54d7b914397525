"""Bounds that change late in training: MiniMax-M1 (arXiv 2506.13585, section 5) lowers the upper
bound of the importance weight and the clipping of gradients where long outputs grow unstable.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_m1.rl.config import RLConfig


@dataclass(frozen=True)
class Bounds:
    """Those of a step."""

    is_weight_max: float
    clip_grad: float


def bounds(config: RLConfig, step: int, window: int) -> Bounds:
    """The bounds of the step that follows ``step`` finished ones, with outputs of ``window`` tokens
    at most."""
    weight, clip = config.rl.is_weight_max, config.optim.clip_grad
    for phase in config.rl.late:
        if step >= phase.from_step and window >= phase.from_window:
            weight = weight if phase.is_weight_max is None else phase.is_weight_max
            clip = clip if phase.clip_grad is None else phase.clip_grad
    return Bounds(weight, clip)
