"""The choice of the next token for a batch of sequences, each in its own way.

The filters are thresholds: all tokens as likely as the last one that top-k or top-p lets in stay.
One uniform number chooses along the cumulative probabilities in the order of the vocabulary, so
that a filter which lets all tokens in changes nothing.

Shapes: S sequences, V tokens of the vocabulary, N of them sorted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LIKELY = 256
"""Tokens that are sorted at first: those that reach a top-p are rarely more."""


def draw(
    logits: Tensor,
    uniforms: NDArray[np.float64],
    temperature: NDArray[np.float64],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
) -> Tensor:
    """Choose a token for each sequence.

    Args:
        logits: [S, V].
        uniforms: [S], in [0, 1).
        temperature, top_k, top_p: [S], as in ``SamplingParams``.

    Returns:
        [S, 3] float64: the token, its log-probability in the distribution that it was drawn from,
        and its log-probability under the model at temperature 1; NaN where logits are not finite.
    """
    logits_SV = logits.float()
    raw_S1 = logits_SV.logsumexp(-1, keepdim=True)
    greedy = temperature == 0
    if greedy.all():
        token_S1 = logits_SV.argmax(-1, keepdim=True)
        drawn_S1 = torch.zeros_like(raw_S1)
    else:
        scaled_SV = logits_SV
        if (temperature != 1).any():
            scaled_SV = logits_SV / _column(np.where(greedy, 1.0, temperature), logits_SV)
        scaled_SV = _within_top_p(_within_top_k(scaled_SV, top_k), top_p)
        total_S1 = scaled_SV.logsumexp(-1, keepdim=True)
        token_S1 = _along(scaled_SV - total_S1, uniforms)
        if greedy.any():
            greedy_S1 = _column(greedy, logits_SV)
            token_S1 = torch.where(greedy_S1, logits_SV.argmax(-1, keepdim=True), token_S1)
            total_S1 = torch.where(greedy_S1, scaled_SV.gather(1, token_S1), total_S1)
        drawn_S1 = scaled_SV.gather(1, token_S1) - total_S1
    own_S1 = logits_SV.gather(1, token_S1) - raw_S1
    found_S3 = torch.cat([token_S1.double(), drawn_S1.double(), own_S1.double()], dim=1)
    return found_S3.masked_fill(~raw_S1.isfinite(), torch.nan)


def _within_top_k(scaled_SV: Tensor, top_k: NDArray[np.int64]) -> Tensor:
    """The logits, -inf where they are below the k-th largest; k = 0 keeps all."""
    vocabulary = scaled_SV.shape[1]
    limited = (top_k > 0) & (top_k < vocabulary)
    if not limited.any():
        return scaled_SV
    likely_SN = scaled_SV.topk(int(top_k[limited].max()), dim=1).values
    last_S1 = _column(np.where(limited, top_k, 1) - 1, scaled_SV, torch.int64)
    threshold_S1 = likely_SN.gather(1, last_S1)
    threshold_S1 = threshold_S1.masked_fill(_column(~limited, scaled_SV), -torch.inf)
    return scaled_SV.masked_fill(scaled_SV < threshold_S1, -torch.inf)


def _within_top_p(scaled_SV: Tensor, top_p: NDArray[np.float64]) -> Tensor:
    """The logits, -inf where the more likely tokens reach the probability without them."""
    if (top_p >= 1).all():
        return scaled_SV
    vocabulary = scaled_SV.shape[1]
    p_S1 = _column(top_p, scaled_SV, torch.float32)
    total_S1 = scaled_SV.logsumexp(-1, keepdim=True)
    for count in (min(LIKELY, vocabulary), vocabulary):
        likely_SN = scaled_SV.topk(count, dim=1).values
        probs_SN = (likely_SN - total_S1).exp()
        stays_SN = probs_SN.cumsum(-1) - probs_SN < p_S1
        if count == vocabulary or bool((~stays_SN[:, -1:] | (p_S1 >= 1)).all()):
            break
    # The first stays whatever top_p is.
    last_S1 = (stays_SN.sum(-1, keepdim=True) - 1).clamp(min=0)
    threshold_S1 = likely_SN.gather(1, last_S1).masked_fill(p_S1 >= 1, -torch.inf)
    return scaled_SV.masked_fill(scaled_SV < threshold_S1, -torch.inf)


def _along(logprobs_SV: Tensor, uniforms: NDArray[np.float64]) -> Tensor:
    """[S, 1], the tokens at these shares of the cumulative probabilities."""
    # Float64: 200,000 sums of float32 would move the borders.
    reached_SV = logprobs_SV.double().exp().cumsum(-1)
    shares_S1 = _column(uniforms, reached_SV) * reached_SV[:, -1:]
    # Right: a token of probability zero has no border of its own. Only NaN is beyond all.
    found_S1 = torch.searchsorted(reached_SV, shares_S1, right=True)
    return found_S1.clamp(max=logprobs_SV.shape[1] - 1)


def _column(values: NDArray[Any], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[S, 1] of ``dtype``, that of ``like`` where not given for numbers."""
    column = torch.from_numpy(values)[:, None]
    if dtype is None and column.dtype != torch.bool:
        dtype = like.dtype
    return column.to(like.device, dtype)
