"""Softmax attention of new tokens to keys and values that lie in a pool: inference.

A slot of the pool is a row for the tokens of one sequence, in their order. PyTorch has no attention
over pages, and rows are views: nothing is gathered. What lies in a slot behind its sequence is
never read, or has weight zero and must then be finite. No gradients are recorded.

Shapes: P slots of M places, T tokens of one sequence, S sequences, H query heads, K key/value
heads, G = H / K, D head width.
"""

from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention import attention_forward

DECODE_BACKENDS = ("auto", "runs", "masked")


@torch.no_grad()
def attend_one(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: list[int],
    lengths: list[int],
    *,
    backend: str = "auto",
) -> Tensor:
    """One query of each sequence against the tokens that its slot holds.

    Args:
        q: `[S, H, D]`.
        keys, values: `[P, K, M, D]` of q's dtype.
        slots: rising; which slot each sequence has.
        lengths: how many tokens of it the query sees, at least one.
        backend: "runs" computes neighbouring slots of equal lengths together and reads nothing
            else; "masked" all slots at once up to the greatest length, for devices on which a call
            costs more than what it reads; "auto" is "runs" on a CPU.

    Returns:
        `[S, H, D]` in q's dtype.
    """
    if backend not in DECODE_BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(DECODE_BACKENDS)}, got {backend!r}")
    q_SKGD = q.unflatten(1, (keys.shape[1], -1))
    if backend == "masked" or (backend == "auto" and q.device.type != "cpu"):
        return _masked(q_SKGD, keys, values, slots, lengths).flatten(1, 2)
    out_SKGD = torch.empty_like(q_SKGD)
    begin = 0
    # Neighbours have one difference between slot and number, and one length.
    shifts = (slot - number for number, slot in enumerate(slots))
    for (shift, length), run in groupby(zip(shifts, lengths, strict=True)):
        end = begin + sum(1 for _ in run)
        pool = slice(begin + shift, end + shift)
        out_SKGD[begin:end] = scaled_dot_product_attention(
            q_SKGD[begin:end], keys[pool, :, :length], values[pool, :, :length]
        )
        begin = end
    return out_SKGD.flatten(1, 2)


def _masked(
    q_SKGD: Tensor, keys_PKMD: Tensor, values_PKMD: Tensor, slots: list[int], lengths: list[int]
) -> Tensor:
    places = torch.tensor([slots, lengths], device=q_SKGD.device)
    # Slots without a query here see one token, so that none is without any.
    lengths_P = places.new_ones(keys_PKMD.shape[0]).index_copy_(0, *places)
    longest = max(lengths)
    mask_PM = torch.arange(longest, device=q_SKGD.device) < lengths_P[:, None]
    q_PKGD = q_SKGD.new_zeros(keys_PKMD.shape[0], *q_SKGD.shape[1:])
    q_PKGD.index_copy_(0, places[0], q_SKGD)
    out_PKGD = scaled_dot_product_attention(
        q_PKGD,
        keys_PKMD[:, :, :longest],
        values_PKMD[:, :, :longest],
        attn_mask=mask_PM[:, None, None],
    )
    return out_PKGD.index_select(0, places[0])


@torch.no_grad()
def attend_next(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, before: int
) -> Tensor:
    """The next tokens of one sequence, which follow those that its slot holds.

    Args:
        q: `[T, H, D]`.
        k, v: `[T, K, D]`, theirs.
        keys, values: `[K, M, D]`, the slot.
        before: how many tokens it held before these.

    Returns:
        `[T, H, D]` in q's dtype.
    """
    options = {
        "scale": q.shape[2] ** -0.5,
        "out_dtype": torch.promote_types(q.dtype, torch.float32),
    }
    own = [0, q.shape[0]]
    out, lse = attention_forward(q, k, v, bounds_q=own, bounds_k=own, causal=True, **options)
    if before:
        earlier = (x[:, :before].transpose(0, 1) for x in (keys, values))
        bounds = [0, before]
        out_b, lse_b = attention_forward(
            q, *earlier, bounds_q=own, bounds_k=bounds, causal=False, **options
        )
        share_TH1 = torch.sigmoid(lse_b - lse).mT[..., None]
        out = torch.lerp(out, out_b, share_TH1.to(out.dtype))
    return out.to(q.dtype)
