"""The picture of tools/compare_rl.py: mean curves over seeds with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megatron_m1.observe.figure import COLORS, FAINT, SMOOTH, STYLE
from tools.seeds import half_interval


def draw(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], reference: str, path: Path) -> None:
    """Draw curves as a PNG of 1000 x 600 pixels.

    Args:
        curves: updates [B] and rewards [S, B] of each objective.
        reference: the one whose last mean reward is drawn as a level.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
        axis = figure.subplots()
        for color, (name, (updates, rewards)) in zip(COLORS, curves.items(), strict=False):
            mean, half = rewards.mean(axis=0), half_interval(rewards)
            axis.plot(updates, mean, color=color, label=name, **SMOOTH)
            if len(rewards) > 1:
                axis.fill_between(updates, mean - half, mean + half, color=color, alpha=0.12, lw=0)
        level = curves[reference][1][:, -1].mean()
        axis.axhline(level, color=FAINT, lw=1, ls="--", label=f"{reference}'s final reward")
        seeds = len(curves[reference][1])
        axis.set_title(f"Reward of fresh problems, mean and 95 % interval of {seeds} seeds")
        axis.set_xlabel("update")
        axis.legend(loc="lower right")
        figure.savefig(path)
