"""Packed attention as its formula, one segment at a time. The truth for every backend.

Shapes: T queries and S keys in the row, L and M in a segment, H query heads, K key/value heads,
D head width.
"""

from itertools import pairwise

import torch
from torch import Tensor

from kernels.attention.segments import Segments
from kernels.autocast import without_autocast


@without_autocast
def forward(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    segments: Segments,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`attention_forward`, differentiable by autograd itself, float64 if q is.

    Arguments are checked by the caller.
    """
    dtype = torch.promote_types(q_THD.dtype, torch.float32)
    q_HTD, k_HSD, v_HSD = _by_head(q_THD, k_SKD, v_SKD, dtype)
    outputs, lses = [], []
    for queries, keys in _spans(segments):
        scores_HLM = _scores(q_HTD[:, queries], k_HSD[:, keys], scale, segments.causal)
        lse_HL = torch.logsumexp(scores_HLM, dim=-1)
        outputs.append(torch.exp(scores_HLM - lse_HL[..., None]) @ v_HSD[:, keys])
        lses.append(lse_HL)
    out_THD = torch.cat(outputs, dim=1).transpose(0, 1)
    return out_THD.to(out_dtype), torch.cat(lses, dim=1)


@without_autocast
def backward(
    d_out_THD: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    d_lse_HT: Tensor | None,
    segments: Segments,
    scale: float,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_backward`: P = exp(S - lse), dS = P (dP - sum of d_out * out + d_lse)."""
    dtype = lse_HT.dtype
    q_HTD, k_HSD, v_HSD = _by_head(q_THD, k_SKD, v_SKD, dtype)
    d_out_HTD, out_HTD = (x.to(dtype).transpose(0, 1) for x in (d_out_THD, out_THD))
    delta_HT = (d_out_HTD * out_HTD).sum(-1)
    if d_lse_HT is not None:
        delta_HT = delta_HT - d_lse_HT
    dq, dk, dv = (torch.zeros_like(x) for x in (q_HTD, k_HSD, v_HSD))
    for queries, keys in _spans(segments):
        q, k = q_HTD[:, queries], k_HSD[:, keys]
        d_out = d_out_HTD[:, queries]
        scores_HLM = _scores(q, k, scale, segments.causal)
        p_HLM = torch.exp(scores_HLM - lse_HT[:, queries, None])
        ds_HLM = scale * p_HLM * (d_out @ v_HSD[:, keys].mT - delta_HT[:, queries, None])
        dq[:, queries] = ds_HLM @ k
        dk[:, keys] = ds_HLM.mT @ q
        dv[:, keys] = p_HLM.mT @ d_out
    dk, dv = (x.unflatten(0, (k_SKD.shape[1], -1)).sum(1) for x in (dk, dv))
    dq, dk, dv = (x.transpose(0, 1).to(grad_dtype) for x in (dq, dk, dv))
    return dq, dk, dv


def _by_head(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    group = q_THD.shape[1] // k_SKD.shape[1]
    k_SHD, v_SHD = (x.repeat_interleave(group, dim=1) for x in (k_SKD, v_SKD))
    q, k, v = (x.to(dtype).transpose(0, 1) for x in (q_THD, k_SHD, v_SHD))
    return q, k, v


def _spans(segments: Segments) -> list[tuple[slice, slice]]:
    queries = (slice(*span) for span in pairwise(segments.bounds_q))
    keys = (slice(*span) for span in pairwise(segments.bounds_k))
    return list(zip(queries, keys, strict=True))


def _scores(q_HLD: Tensor, k_HMD: Tensor, scale: float, causal: bool) -> Tensor:
    scores_HLM = scale * (q_HLD @ k_HMD.mT)
    if not causal:
        return scores_HLM
    later_LL = torch.ones_like(scores_HLM[0], dtype=torch.bool).triu(1)
    return scores_HLM.masked_fill(later_LL, -torch.inf)
