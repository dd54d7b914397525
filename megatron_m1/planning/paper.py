"""What MiniMax's papers say of costs, to hold our counting against.

Source: MiniMax-M1 (arXiv 2506.13585), abstract and figure 1 (right), whose markers were read from
the vector graphic of the report: exact to about 1e13 operations.
"""

from __future__ import annotations

from megatron_m1.planning import flops
from megatron_m1.planning.flops import Countable

PARAMETERS = 456_089_655_296
"""Of the released checkpoint, to the unit (its index and shapes)."""

RL_GPUS, RL_DAYS, RL_DOLLARS = 512, 21, 534_700
"""The whole RL training: H800s, three weeks, dollars of rent (abstract)."""

K = 1024
FIGURE_TOKENS = tuple(K * thousand for thousand in (*range(1, 122, 8), 128))
"""Generated tokens at the markers of figure 1 (right)."""
FIGURE_M1 = (
    *(0.011, 0.098, 0.188, 0.281, 0.376, 0.474, 0.574, 0.677, 0.783),
    *(0.891, 1.002, 1.116, 1.232, 1.351, 1.473, 1.597, 1.708),
)
"""Operations of MiniMax-M1 at the markers, in 1e16."""
FIGURE_R1 = (
    *(0.008, 0.099, 0.237, 0.422, 0.654, 0.933, 1.259, 1.632, 2.052),
    *(2.518, 3.032, 3.593, 4.200, 4.855, 5.556, 6.305, 6.998),
)
"""Those of DeepSeek-R1."""
VALUE_SHARE_M1, VALUE_SHARE_R1 = 1 / 2, 2 / 5
"""Of the operations of attention, those on values: heads of 128 and 128, and of 192 and 128."""


def as_in_figure(model: Countable, tokens: int, value_share: float) -> float:
    """Operations of generating ``tokens`` tokens, counted in the way that meets the figure.

    The figure's curves are a n + b n^2. The b of R1 and Qwen3-235B is that of causal scores (each
    token meets those before it) but of values counted for all n tokens at every step, to 0.1 %.
    M1's own curve has the b of eight softmax layers, not ten, and an a that is a tenth larger than
    its weights and states make it. The paper explains neither.

    Args:
        value_share: the part of the attention's operations that is spent on values.
    """
    without_attention = tokens * sum(model.forward_flops(0).values())
    causal = flops.generation(model, tokens) - without_attention
    return without_attention + causal * (1 + value_share)
