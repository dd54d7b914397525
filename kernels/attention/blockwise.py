"""Causal attention of equal documents, one block of queries at a time: any device, plain PyTorch.

A block sees all its keys at once, so its softmax needs no running maximum, and memory is linear in
the tokens. The heads of a group stand under each other as rows of one product.

Shapes: N documents of L tokens, H = K * G query heads, K key/value heads, D head width, R = G * the
queries of a block, E the keys up to its end.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 128


def forward(q_NHLD: Tensor, k_NKLD: Tensor, v_NKLD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output `[N, H, L, D]` and its log-sum-exp `[N, H, L]`."""
    dtype = torch.promote_types(q_NHLD.dtype, torch.float32)
    k, v = k_NKLD.to(dtype), v_NKLD.to(dtype)
    out_NHLD = torch.empty_like(q_NHLD)
    lse_NHL = q_NHLD.new_empty(q_NHLD.shape[:3], dtype=dtype)
    for block in _blocks(q_NHLD):
        scores_NKRE = _scores(_rows(q_NHLD, block, k), k, block, scale)
        lse_NKR1 = torch.logsumexp(scores_NKRE, dim=-1, keepdim=True)
        out_NKRD = scores_NKRE.sub_(lse_NKR1).exp_() @ v[:, :, : block.stop]
        out_NHLD[:, :, block] = _heads(out_NKRD, block)
        lse_NHL[:, :, block] = _heads(lse_NKR1, block)[..., 0]
    return out_NHLD, lse_NHL


def backward(
    d_out_NHLD: Tensor,
    d_lse_NHL: Tensor | None,
    q_NHLD: Tensor,
    k_NKLD: Tensor,
    v_NKLD: Tensor,
    out_NHLD: Tensor,
    lse_NHL: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v: dS = P (dP - delta + d_lse), delta = sum of d_out * out."""
    dtype = lse_NHL.dtype
    k, v = k_NKLD.to(dtype), v_NKLD.to(dtype)
    delta_NHL = (d_out_NHLD.to(dtype) * out_NHLD).sum(-1)
    if d_lse_NHL is not None:
        delta_NHL -= d_lse_NHL
    dq_NHLD, dk, dv = torch.empty_like(q_NHLD), torch.zeros_like(k), torch.zeros_like(v)
    for block in _blocks(q_NHLD):
        keys = slice(0, block.stop)
        q_NKRD, d_out_NKRD = _rows(q_NHLD, block, k), _rows(d_out_NHLD, block, k)
        lse_NKR1 = _rows(lse_NHL[..., None], block, k)
        p_NKRE = _scores(q_NKRD, k, block, scale).sub_(lse_NKR1).exp_()
        dv[:, :, keys] += p_NKRE.mT @ d_out_NKRD
        ds_NKRE = (d_out_NKRD @ v[:, :, keys].mT).sub_(_rows(delta_NHL[..., None], block, k))
        ds_NKRE.mul_(p_NKRE).mul_(scale)
        dq_NHLD[:, :, block] = _heads(ds_NKRE @ k[:, :, keys], block)
        dk[:, :, keys] += ds_NKRE.mT @ q_NKRD
    return dq_NHLD, dk, dv


def _blocks(q_NHLD: Tensor) -> Iterator[slice]:
    L = q_NHLD.shape[2]
    return (slice(begin, min(begin + BLOCK, L)) for begin in range(0, L, BLOCK))


def _rows(x_NHLD: Tensor, block: slice, k_NKLD: Tensor) -> Tensor:
    """The `[N, K, R, D]` of one block, in the dtype and over the heads of `k_NKLD`."""
    x_NKGLD = x_NHLD[:, :, block].to(k_NKLD.dtype).unflatten(1, (k_NKLD.shape[1], -1))
    return x_NKGLD.flatten(2, 3)


def _heads(x_NKRD: Tensor, block: slice) -> Tensor:
    """The inverse of `_rows`: `[N, K, R, D]` to `[N, H, block, D]`."""
    return x_NKRD.unflatten(2, (-1, block.stop - block.start)).flatten(1, 2)


def _scores(q_NKRD: Tensor, k_NKLD: Tensor, block: slice, scale: float) -> Tensor:
    """The scaled scores `[N, K, R, E]` of a block, -inf where the key comes after the query."""
    scores_NKRE = (q_NKRD @ k_NKLD[:, :, : block.stop].mT).mul_(scale)
    size = block.stop - block.start
    later = torch.ones(size, size, dtype=torch.bool, device=q_NKRD.device).triu(1)
    own_keys = scores_NKRE[..., block.start :].unflatten(2, (-1, size))
    own_keys.masked_fill_(later, -torch.inf)
    return scores_NKRE
