"""Bounds that change late in training."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_m1.rl.config import LatePhase
from megatron_m1.rl.late import Bounds, bounds
from tests.rl.stored import rl_config

CONFIG = rl_config("unused")
PHASES = [
    LatePhase(from_step=100, is_weight_max=3.0),
    LatePhase(from_window=64, clip_grad=0.1),
    LatePhase(from_step=200, from_window=80, is_weight_max=2.0, clip_grad=0.05),
]


@pytest.mark.parametrize(
    ("step", "window", "expected"),
    [
        (0, 40, Bounds(5.0, 0.5)),
        (100, 40, Bounds(3.0, 0.5)),
        (99, 64, Bounds(5.0, 0.1)),
        (300, 64, Bounds(3.0, 0.1)),
        (199, 80, Bounds(3.0, 0.1)),
        (200, 80, Bounds(2.0, 0.05)),
    ],
)
def test_the_last_phase_that_is_reached_holds(step: int, window: int, expected: Bounds) -> None:
    config = replace(CONFIG, rl=replace(CONFIG.rl, late=PHASES))
    assert bounds(config, step, window) == expected
