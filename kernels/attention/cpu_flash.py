"""Causal attention of equal documents by PyTorch's own CPU flash kernel.

The kernel groups query heads by itself. It must not be given a length of zero, by which it divides,
nor channels that are not neighbours in memory, which it takes for such.

Shapes: N documents of L tokens, H query heads, K key/value heads, D head width.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(q_NHLD: Tensor, k_NKLD: Tensor, v_NKLD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output `[N, H, L, D]` and its log-sum-exp `[N, H, L]`."""
    q, k, v = (_with_dense_channels(x) for x in (q_NHLD, k_NKLD, v_NKLD))
    return _forward(q, k, v, 0.0, True, scale=scale)


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
    """The gradients of q, k and v.

    The kernel knows no gradient of the log-sum-exp. With it, dS = P (dP - delta + d_lse), where the
    kernel forms delta = sum(d_out * out) over the width. So a further channel, 1 in d_out, -d_lse
    in out and 0 in q, k and v, leaves the scores and dP alone and brings d_lse in.
    """
    d_out, q, k, v, out = d_out_NHLD, q_NHLD, k_NKLD, v_NKLD, out_NHLD
    if d_lse_NHL is not None:
        q, k, v = (pad(x, (0, 1)) for x in (q, k, v))
        d_out = pad(d_out, (0, 1), value=1.0)
        out = torch.cat((out, -d_lse_NHL[..., None].to(out.dtype)), dim=-1)
    d_out, q, k, v, out = (_with_dense_channels(x) for x in (d_out, q, k, v, out))
    dq, dk, dv = _backward(d_out, q, k, v, out, lse_NHL, 0.0, True, scale=scale)
    D = q_NHLD.shape[-1]
    return dq[..., :D], dk[..., :D], dv[..., :D]


def _with_dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
