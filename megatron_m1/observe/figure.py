"""The figure of a report: loss or reward, stability, speed, and how the experts share the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator

from megatron_m1.observe.run_log import REWARD, Curve, RunLog

COLORS = ("#2a6f97", "#e07a3f", "#4c956c", "#9b5094", "#c9a227", "#5c677d")
INK, FAINT = "#2b2d33", "#7d828c"
KINDS = {"L": ("lightning layer", "#f2c14e"), "S": ("softmax layer", "#3d405b")}
RAW: dict[str, Any] = {"alpha": 0.45, "lw": 1}
SMOOTH: dict[str, Any] = {"lw": 2.3}
POINTS: dict[str, Any] = {"marker": "o", "mec": "white", "ms": 8, "lw": 0, "zorder": 4}
# metric -> title of the small panels below the loss, and below the reward of RL.
_PANELS = {
    "optim/grad_norm": "Gradient norm",
    "optim/lr": "Learning rate",
    "perf/tokens_per_s": "Tokens per second",
}
_RL_PANELS = {
    "response_length/mean": "Length",
    "actor/entropy": "Entropy",
    "actor/pg_clipfrac": "Clip fraction",
    "training/rollout_probs_diff_mean": "Mismatch",
}
STYLE = {
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#c9ccd3",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "grid.color": "#eceef2",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.frameon": False,
    "legend.fontsize": 11,
}


def draw(runs: Sequence[RunLog], title: str, path: Path) -> None:
    """Draw the runs over each other as a PNG of 1400 x 800 pixels."""
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.02)
        figure = Figure(figsize=(14, 8), dpi=100, layout=layout)
        figure.suptitle(title, x=0.012, ha="left", size=17, weight="bold")
        loaded = [run for run in runs if run.load is not None]
        if loaded:
            halves: Any = figure.subfigures(1, 2, width_ratios=(2.4, 1))
            curves, loads = halves
            _draw_loads(loads, loaded)
        else:
            curves = figure.subfigures(1, 1)
        _draw_curves(curves, runs)
        figure.savefig(path)


def smoothing_window(curve: Curve) -> int:
    """How many records the smoothed curve looks at: about a fiftieth of the run, and odd."""
    return max(5, len(curve.values) // 50) | 1


def _draw_curves(figure: SubFigure, runs: Sequence[RunLog]) -> None:
    is_rl = any(run.is_rl for run in runs)
    small = _RL_PANELS if is_rl else _PANELS
    axes: dict[str, Axes] = figure.subplot_mosaic(
        [["top"] * len(small), [*small]], height_ratios=(1.6, 1)
    )
    for axis in axes.values():
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.margins(x=0.02)
        axis.set_xlabel("step")
    if is_rl:
        _draw_metric(axes["top"], runs, REWARD, "Reward")
        axes["top"].legend(handles=_reward_legend(runs), loc="lower right")
    else:
        _draw_loss(axes["top"], runs)
    for metric, title in small.items():
        _draw_metric(axes[metric], runs, metric, title, smooth=metric != "optim/lr")
        if metric == "perf/tokens_per_s":
            axes[metric].yaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            axes[metric].yaxis.set_major_formatter("{x:g}")


def _reward_legend(runs: Sequence[RunLog]) -> list[Line2D]:
    window = max(smoothing_window(run.curve(REWARD)) for run in runs)
    color = COLORS[0] if len(runs) == 1 else FAINT
    names = [Line2D([], [], color=c, lw=4, label=run.name) for run, c in _colored(runs)]
    return (names if len(runs) > 1 else []) + [
        Line2D([], [], color=color, **RAW, label="mean of the step's responses"),
        Line2D([], [], color=color, **SMOOTH, label=f"smoothed over {window} records"),
    ]


def _draw_loss(axis: Axes, runs: Sequence[RunLog]) -> None:
    window = max(smoothing_window(run.curve("train/loss")) for run in runs)
    low, high = [], []
    for run, color in _colored(runs):
        raw = run.curve("train/loss").finite
        smooth, val = raw.smoothed(window), run.curve("val/loss").finite
        axis.plot(raw.steps, raw.values, color=color, **RAW)
        axis.plot(smooth.steps, smooth.values, color=color, **SMOOTH)
        axis.plot(val.steps, val.values, color=color, **POINTS)
        low += [*raw.values, *val.values]
        high += [*smooth.values, *val.values]  # so that a spike does not flatten the rest
    if low:
        margin = 0.06 * (max(high) - min(low)) or 1.0
        axis.set_ylim(min(low) - margin, max(high) + margin)
    axis.set_title("Loss")
    axis.legend(handles=_loss_legend(runs, window), loc="upper right")


def _loss_legend(runs: Sequence[RunLog], window: int) -> list[Line2D]:
    color = COLORS[0] if len(runs) == 1 else FAINT
    names = [Line2D([], [], color=c, lw=4, label=run.name) for run, c in _colored(runs)]
    return (names if len(runs) > 1 else []) + [
        Line2D([], [], color=color, **RAW, label="training"),
        Line2D([], [], color=color, **SMOOTH, label=f"training, smoothed over {window} records"),
        Line2D([], [], color=color, **POINTS, label="validation"),
    ]


def _draw_metric(
    axis: Axes, runs: Sequence[RunLog], metric: str, title: str, smooth: bool = True
) -> None:
    values: list[float] = []
    for run, color in _colored(runs):
        raw = run.curve(metric).finite
        values += [*raw.values]
        if smooth:
            axis.plot(raw.steps, raw.values, color=color, **RAW)
            raw = raw.smoothed(smoothing_window(raw))
        axis.plot(raw.steps, raw.values, color=color, **SMOOTH)
    if values:
        axis.set_ylim(0, 1.06 * np.quantile(values, 0.99) or 1.0)
    axis.set_title(title)


def _draw_loads(figure: SubFigure, runs: Sequence[RunLog]) -> None:
    axes = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for axis, run in zip(axes, runs, strict=True):
        image = _draw_load(axis, run)
        axis.set_title("Expert load" if len(runs) == 1 else f"Expert load, {run.name}")
    axes[-1].set_xlabel("expert")
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=35, extend="max")
    bar.set_label("tokens / fair share, over the last records")
    bar.outline.set_visible(False)
    kinds = [kind for kind in KINDS if any(kind in run.layer_kinds for run in runs)]
    if kinds:
        handles = [Patch(color=KINDS[kind][1], label=KINDS[kind][0]) for kind in kinds]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=1)


def _draw_load(axis: Axes, run: RunLog) -> AxesImage:
    assert run.load is not None
    experts = run.load.shape[1]
    image = axis.imshow(run.load * experts, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_ylabel("layer")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(MaxNLocator(8, integer=True))
    if run.layer_kinds:
        axis.tick_params(axis="y", pad=16)
    for layer, kind in enumerate(run.layer_kinds):
        _mark_layer(axis, layer, KINDS[kind][1])
    return image


def _mark_layer(axis: Axes, layer: int, color: str) -> None:
    place = axis.get_yaxis_transform()  # x as a share of the axes, y in layers
    strip = Rectangle((-0.045, layer - 0.5), 0.03, 1, transform=place, clip_on=False)
    strip.set(color=color, lw=0, antialiased=False)
    axis.add_patch(strip)


def _colored(runs: Sequence[RunLog]) -> list[tuple[RunLog, str]]:
    return [(run, COLORS[i % len(COLORS)]) for i, run in enumerate(runs)]
