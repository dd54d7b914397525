"""Packed causal attention as its formula, one document at a time. The truth for every backend.

Shapes: T tokens in the row, L in a document, H query heads, K key/value heads, D head width.
"""

from itertools import pairwise

import torch
from torch import Tensor


def varlen_attention_reference(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, bounds: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """`varlen_attention`, differentiable by autograd itself, float64 if q is.

    Arguments are checked by the caller; `bounds` are the document borders.
    """
    dtype = torch.promote_types(q_THD.dtype, torch.float32)
    group = q_THD.shape[1] // k_TKD.shape[1]
    q_HTD = q_THD.to(dtype).transpose(0, 1)
    k_HTD, v_HTD = (
        x.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1) for x in (k_TKD, v_TKD)
    )
    outputs, lses = [], []
    for begin, end in pairwise(bounds):
        q_HLD, k_HLD, v_HLD = (x[:, begin:end] for x in (q_HTD, k_HTD, v_HTD))
        later_LL = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q_THD.device)
        scores_HLL = scale * (q_HLD @ k_HLD.mT)
        scores_HLL = scores_HLL.masked_fill(later_LL.triu(1), -torch.inf)
        lse_HL = torch.logsumexp(scores_HLL, dim=-1)
        outputs.append(torch.exp(scores_HLL - lse_HL[..., None]) @ v_HLD)
        lses.append(lse_HL)
    out_THD = torch.cat(outputs, dim=1).transpose(0, 1)
    return out_THD.to(q_THD.dtype), torch.cat(lses, dim=1)
