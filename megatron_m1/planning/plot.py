"""Costs against length in one picture: ours, the same with softmax attention alone, and R1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from megatron_m1.model.config import ModelConfig
from megatron_m1.observe.figure import COLORS, FAINT, STYLE
from megatron_m1.planning import paper
from megatron_m1.planning.answer import Compared, compared
from megatron_m1.planning.deepseek import DeepSeek
from megatron_m1.planning.flops import Countable
from megatron_m1.planning.memory import GIB

K = 1024
_NEAR = np.linspace(0, 128 * K, 65)[1:]
_FAR = np.geomspace(K, 1024 * K, 81)


def draw(model: ModelConfig, path: Path) -> None:
    """Draw a PNG of 1500 x 560 pixels."""
    names = (model.name, "softmax in every layer", "DeepSeek-R1")
    near = [compared(model, round(tokens)) for tokens in _NEAR]
    far = [compared(model, round(tokens)) for tokens in _FAR]
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1, wspace=0.03)
        figure = Figure(figsize=(15, 5.6), dpi=100, layout=layout)
        figure.suptitle(
            f"What length costs {model.name}", x=0.012, ha="left", size=17, weight="bold"
        )
        generation, decode, state = figure.subplots(1, 3)
        for axis in (decode, state):
            axis.set(xscale="log", yscale="log", xlim=(K, 1024 * K))
        _lines(generation, near, names, lambda at: at.generation, 1e16)
        _lines(decode, far, names, lambda at: at.decode, 1e12)
        _lines(state, far, names, lambda at: at.state, GIB)
        if model.num_params() == paper.PARAMETERS:
            _draw_paper(generation, model)
        _label(generation, "Generating all tokens", "$10^{16}$ operations", range(0, 129, 32))
        _label(decode, "The last token", "TFLOP", (1, 4, 16, 64, 256, 1024))
        _label(state, "What a sequence keeps", "GiB", (1, 4, 16, 64, 256, 1024))
        for axis, values in ((decode, (0.1, 0.2, 0.5, 1, 2, 5)), (state, (0.1, 1, 10, 100))):
            axis.yaxis.set_major_locator(FixedLocator(values))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
        generation.set(xlim=(0, 132 * K), ylim=(0, None))
        generation.legend(loc="upper left", borderaxespad=0.1)
        figure.savefig(path)


def _lines(
    axis: Axes,
    found: Sequence[Compared],
    names: Sequence[str],
    value: Callable[[Compared], Sequence[float]],
    unit: float,
) -> None:
    tokens = [at.tokens for at in found]
    values = np.array([value(at) for at in found]) / unit
    for number, name in enumerate(names):
        axis.plot(tokens, values[:, number], color=COLORS[number], lw=2.3, label=name)


def _draw_paper(axis: Axes, model: ModelConfig) -> None:
    """The markers of the paper's figure, and the way of counting that meets them."""
    drawn: tuple[tuple[Countable, float, Sequence[float], str], ...] = (
        (model, paper.VALUE_SHARE_M1, paper.FIGURE_M1, COLORS[0]),
        (DeepSeek(), paper.VALUE_SHARE_R1, paper.FIGURE_R1, COLORS[2]),
    )
    for counted, share, markers, color in drawn:
        values = [paper.as_in_figure(counted, round(n), share) / 1e16 for n in _NEAR]
        axis.plot(_NEAR, values, ":", color=color, lw=1.4)
        axis.plot(paper.FIGURE_TOKENS, markers, "o", ms=4.5, mfc="white", mec=color, mew=1.2)
    axis.plot([], [], ":", color=FAINT, lw=1.4, label="counted as the paper draws")
    axis.plot([], [], "o", ms=4.5, mfc="white", mec=FAINT, label="the paper, figure 1")


def _label(axis: Axes, title: str, unit: str, ticks: Sequence[int]) -> None:
    axis.set_title(title)
    axis.set(xlabel="tokens", ylabel=unit)
    axis.xaxis.set_major_locator(FixedLocator([tick * K for tick in ticks]))
    axis.xaxis.set_major_formatter(FuncFormatter(_length))
    axis.xaxis.set_minor_locator(NullLocator())


def _length(tokens: float, _: int) -> str:
    """0, 64K, 1M."""
    thousands = tokens / K
    if thousands >= K:
        return f"{thousands / K:g}M"
    return f"{thousands:g}K" if tokens else "0"
