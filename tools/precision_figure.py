"""The figure of the LM head's precision: rollout against trainer, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from megatron_m1.observe.figure import COLORS, FAINT, STYLE
from megatron_m1.observe.run_log import REWARD, RunLog

HEADS = (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32"))
"""Of rollout and trainer."""

CORRELATION = "training/rollout_actor_probs_pearson_corr"
DIFFERENCE = "training/rollout_probs_diff_mean"


@dataclass
class Measured:
    """A pair of heads at one size of the common logit.

    Attributes:
        heads: the precision of the rollout's, and that of the trainer's.
        largest_logit: mean over the tokens of the largest logit by magnitude.
        metrics: as RL records them.
        rollout, trainer: probabilities of the tokens drawn.
    """

    heads: str
    size: float
    largest_logit: float
    metrics: dict[str, float]
    rollout: list[float]
    trainer: list[float]


COLOR = dict(zip((", ".join(heads) for heads in HEADS), COLORS[1::-1] + COLORS[2:3], strict=True))


def draw_figure(found: Sequence[Measured], runs: Sequence[RunLog], path: Path) -> None:
    """A PNG of 1500 x 900 pixels: tokens of each pair of heads at the size where they differ most,
    the mean difference over all sizes, and the rewards of runs."""
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12, wspace=0.03, hspace=0.04)
        figure = Figure(figsize=(15, 9), dpi=100, layout=layout)
        figure.suptitle(
            "Probabilities of the tokens drawn: rollout against trainer, BF16 body",
            x=0.012,
            ha="left",
            size=17,
            weight="bold",
        )
        upper, lower = figure.subfigures(2, 1, height_ratios=(1.25, 1))
        for axis, heads in zip(upper.subplots(1, len(COLOR)), COLOR, strict=True):
            _scatter(axis, worst(found, heads))
        differences, rewards = lower.subplots(1, 2)
        _differences(differences, found)
        _rewards(rewards, runs)
        figure.savefig(path)


def worst(found: Sequence[Measured], heads: str) -> Measured:
    """The size at which the probabilities of a pair of heads differ most."""
    return max(
        (one for one in found if one.heads == heads), key=lambda one: one.metrics[DIFFERENCE]
    )


def _scatter(axis: Axes, found: Measured) -> None:
    axis.plot([0, 1], [0, 1], color=FAINT, lw=0.8)
    axis.plot(found.rollout, found.trainer, ".", ms=4, alpha=0.5, color=COLOR[found.heads])
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="rollout", ylabel="trainer")
    axis.set_title(f"Heads {found.heads}\nlargest logit {found.largest_logit:.0f}")
    correlation, difference = found.metrics[CORRELATION], found.metrics[DIFFERENCE]
    text = f"correlation {correlation:.6f}\nmean difference {difference:.1e}"
    axis.text(0.04, 0.96, text, transform=axis.transAxes, va="top")


def _differences(axis: Axes, found: Sequence[Measured]) -> None:
    for heads, color in COLOR.items():
        of_heads = sorted((one for one in found if one.heads == heads), key=lambda one: one.size)
        axis.plot(
            [one.largest_logit for one in of_heads],
            [one.metrics[DIFFERENCE] for one in of_heads],
            marker="o",
            color=color,
            label=heads,
        )
    axis.set(xscale="log", yscale="log", xlabel="largest logit, mean over the tokens")
    axis.set_title("Mean difference of the probabilities")
    axis.legend(title="heads of rollout, trainer")


def _rewards(axis: Axes, runs: Sequence[RunLog]) -> None:
    for run, color in zip(runs, COLORS, strict=False):
        curve = run.curve(REWARD).smoothed(5)
        axis.plot(curve.steps, curve.values, color=color, lw=2, label=run.name)
    axis.set(xlabel="step", ylim=(0, None))
    axis.set_title("Reward of RL, smoothed over 5 steps")
    if runs:
        axis.legend(loc="lower right")
