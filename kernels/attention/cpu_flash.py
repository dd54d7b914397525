"""Attention of equal segments by PyTorch's own CPU flash kernel.

The kernel groups query heads by itself. It must not be given a length of zero, by which it divides,
nor channels that are not neighbours in memory, which it takes for such.

Shapes: N segments of L queries and M keys, H query heads, K key/value heads, D head width.
"""

from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    q_NHLD: Tensor,
    k_NKMD: Tensor,
    v_NKMD: Tensor,
    scale: float,
    causal: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The output `[N, H, L, D]` and its log-sum-exp `[N, H, L]`.

    The kernel knows one dtype, so half precision is raised to an `out_dtype` of float32.
    """
    dtype = torch.promote_types(q_NHLD.dtype, out_dtype)
    q, k, v = (_readable(x, dtype) for x in (q_NHLD, k_NKMD, v_NKMD))
    return _forward(q, k, v, 0.0, causal, scale=scale)


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
    """The gradients of q, k and v, in the widest of all the dtypes.

    The kernel knows no gradient of the log-sum-exp. With it, dS = P (dP - delta + d_lse), where the
    kernel forms delta = sum(d_out * out) over the width. So a further channel, 1 in d_out, -d_lse
    in out and 0 in q, k and v, leaves the scores and dP alone and brings d_lse in.
    """
    d_out, q, k, v, out = d_out_NHLD, q_NHLD, k_NKMD, v_NKMD, out_NHLD
    dtypes = [d_out.dtype, q.dtype, out.dtype, grad_dtype]
    if d_lse_NHL is not None:
        dtypes.append(d_lse_NHL.dtype)
        q, k, v = (pad(x, (0, 1)) for x in (q, k, v))
        d_out = pad(d_out, (0, 1), value=1.0)
        out = torch.cat((out.to(d_lse_NHL.dtype), -d_lse_NHL[..., None]), dim=-1)
    dtype = reduce(torch.promote_types, dtypes)
    d_out, q, k, v, out = (_readable(x, dtype) for x in (d_out, q, k, v, out))
    dq, dk, dv = _backward(d_out, q, k, v, out, lse_NHL, 0.0, causal, scale=scale)
    D = q_NHLD.shape[-1]
    return dq[..., :D], dk[..., :D], dv[..., :D]


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()
