"""Attention of equal segments in blocks of queries and keys: any device, plain PyTorch.

A block of queries meets one block of keys after the other under a running maximum, so memory is
linear in the tokens and the scores that exist at a time are bounded. The heads of a group stand
under each other as rows of one product.

Shapes: N segments of L queries and M keys, H = K * G query heads, K key/value heads, D head width,
R = G * the queries of a block, E the keys of a block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.autocast import without_autocast

BLOCK = 512
"""Queries and keys of a block: long enough for efficient products and few launches, short enough
that a causal document of a thousand tokens skips some of what it must not see."""
SCORES = 1 << 26
"""Score elements that may exist at a time, over the segments taken together; a single segment is
always taken whole, `H * BLOCK**2` of them."""


@without_autocast
def forward(
    q_NHLD: Tensor,
    k_NKMD: Tensor,
    v_NKMD: Tensor,
    scale: float,
    causal: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The output `[N, H, L, D]` in `out_dtype` and its log-sum-exp `[N, H, L]`."""
    dtype = torch.promote_types(q_NHLD.dtype, torch.float32)
    out_NHLD = q_NHLD.new_empty(q_NHLD.shape, dtype=out_dtype)
    lse_NHL = q_NHLD.new_empty(q_NHLD.shape[:3], dtype=dtype)
    K = k_NKMD.shape[1]
    for n in _batches(q_NHLD, k_NKMD):
        k, v = k_NKMD[n], v_NKMD[n]
        for block in _blocks(q_NHLD.shape[2]):
            q_NKRD = _rows(q_NHLD[n, :, block], K, dtype)
            out_NKRD, lse_NKR1 = _attend(q_NKRD, k, v, block, scale, causal)
            out_NHLD[n, :, block] = _heads(out_NKRD, block)
            lse_NHL[n, :, block] = _heads(lse_NKR1, block)[..., 0]
    return out_NHLD, lse_NHL


def _attend(
    q_NKRD: Tensor, k_NKMD: Tensor, v_NKMD: Tensor, block: slice, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The output `[N, K, R, D]` and log-sum-exp `[N, K, R, 1]` of one block of queries."""
    out_NKRD = torch.zeros_like(q_NKRD)
    total_NKR1 = torch.zeros_like(q_NKRD[..., :1])
    highest_NKR1 = torch.full_like(total_NKR1, -torch.inf)
    for keys in _blocks(block.stop if causal else k_NKMD.shape[2]):
        scores_NKRE = _scores(q_NKRD, k_NKMD, block, keys, scale, causal)
        higher_NKR1 = torch.maximum(highest_NKR1, scores_NKRE.amax(-1, keepdim=True))
        fade_NKR1 = torch.exp(highest_NKR1 - higher_NKR1)
        p_NKRE = scores_NKRE.sub_(higher_NKR1).exp_()
        total_NKR1.mul_(fade_NKR1).add_(p_NKRE.sum(-1, keepdim=True))
        out_NKRD.mul_(fade_NKR1).add_(p_NKRE @ v_NKMD[:, :, keys].to(q_NKRD.dtype))
        highest_NKR1 = higher_NKR1
    return out_NKRD.div_(total_NKR1), total_NKR1.log_().add_(highest_NKR1)


@without_autocast
def backward(
    d_out_NHLD: Tensor,
    q_NHLD: Tensor,
    k_NKMD: Tensor,
    v_NKMD: Tensor,
    out_NHLD: Tensor,
    lse_NHL: Tensor,
    d_lse_NHL: Tensor | None,
    scale: float,
    causal: bool,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q in `grad_dtype` and of k and v as summed, in the dtype of the lse.

    P = exp(S - lse), dS = P (dP - delta + d_lse), delta = the sum of d_out * out over the width.
    """
    dtype = lse_NHL.dtype
    dq_NHLD = q_NHLD.new_empty(q_NHLD.shape, dtype=grad_dtype)
    dk_NKMD, dv_NKMD = (x.new_zeros(x.shape, dtype=dtype) for x in (k_NKMD, v_NKMD))
    K = k_NKMD.shape[1]
    for n in _batches(q_NHLD, k_NKMD):
        for block in _blocks(q_NHLD.shape[2]):
            q_NKRD, d_out_NKRD, out_NKRD, lse_NKR1 = (
                _rows(x[n, :, block], K, dtype)
                for x in (q_NHLD, d_out_NHLD, out_NHLD, lse_NHL[..., None])
            )
            delta_NKR1 = (d_out_NKRD * out_NKRD).sum(-1, keepdim=True)
            if d_lse_NHL is not None:
                delta_NKR1 -= _rows(d_lse_NHL[n, :, block, None], K, dtype)
            dq_NKRD = torch.zeros_like(q_NKRD)
            for keys in _blocks(block.stop if causal else k_NKMD.shape[2]):
                k, v = (x[n, :, keys].to(dtype) for x in (k_NKMD, v_NKMD))
                p_NKRE = _scores(q_NKRD, k_NKMD[n], block, keys, scale, causal)
                p_NKRE.sub_(lse_NKR1).exp_()
                dv_NKMD[n, :, keys] += p_NKRE.mT @ d_out_NKRD
                ds_NKRE = (d_out_NKRD @ v.mT).sub_(delta_NKR1).mul_(p_NKRE).mul_(scale)
                dq_NKRD += ds_NKRE @ k
                dk_NKMD[n, :, keys] += ds_NKRE.mT @ q_NKRD
            dq_NHLD[n, :, block] = _heads(dq_NKRD, block)
    return dq_NHLD, dk_NKMD, dv_NKMD


def _batches(q_NHLD: Tensor, k_NKMD: Tensor) -> Iterator[slice]:
    N, H, L, _ = q_NHLD.shape
    each = H * min(L, BLOCK) * min(k_NKMD.shape[2], BLOCK)
    size = max(1, SCORES // each)
    return (slice(begin, begin + size) for begin in range(0, N, size))


def _blocks(length: int) -> Iterator[slice]:
    return (slice(begin, min(begin + BLOCK, length)) for begin in range(0, length, BLOCK))


def _rows(x_NHLD: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """`[N, K, R, D]` of `dtype`, from the `[N, H, L, D]` of one block."""
    return x_NHLD.to(dtype).unflatten(1, (K, -1)).flatten(2, 3)


def _heads(x_NKRD: Tensor, block: slice) -> Tensor:
    """The inverse of `_rows`."""
    return x_NKRD.unflatten(2, (-1, block.stop - block.start)).flatten(1, 2)


def _scores(
    q_NKRD: Tensor, k_NKMD: Tensor, block: slice, keys: slice, scale: float, causal: bool
) -> Tensor:
    """The scaled scores `[N, K, R, E]`, -inf where a causal key comes after the query."""
    scores_NKRE = (q_NKRD @ k_NKMD[:, :, keys].to(q_NKRD.dtype).mT).mul_(scale)
    if causal and keys.start == block.start:
        size = block.stop - block.start
        later = torch.ones(size, size, dtype=torch.bool, device=q_NKRD.device).triu(1)
        scores_NKRE.unflatten(2, (-1, size)).masked_fill_(later, -torch.inf)
    return scores_NKRE
