"""The gated RMSNorm with a hand-written backward that keeps nothing but its inputs.

With r = rsqrt(mean_square + eps), g = sigmoid(gate) and u = dy g x, all of one row:

    dx = dy g w r,  dgate = u w r (1 - g),  dmean_square = -r^3 / 2 * sum(u w),
    dw = sum of u r over the rows.

The part of dx that flows through the mean square is the business of `sum_of_squares`.
Shapes: R rows, W channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sum_of_squares_portable(x: Tensor) -> Tensor:
    """`sum_of_squares` of `[..., W]`, in one pass. Arguments are checked by the caller."""
    return _SumOfSquares.apply(x)


def gated_rms_norm_portable(
    x: Tensor, gate: Tensor, weight: Tensor, mean_square: Tensor, eps: float
) -> Tensor:
    """`gated_rms_norm` of `[..., W]`. Arguments are checked by the caller."""
    return _GatedRMSNorm.apply(x, gate, weight, mean_square, eps)


class _SumOfSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (x * (2 * d_sum)).to(x.dtype)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, mean_square: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, gate, weight, mean_square)
        ctx.eps = eps
        dtype = mean_square.dtype
        y = torch.sigmoid(gate.to(dtype)).mul_(x)
        return y.mul_(torch.rsqrt(mean_square + eps)).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, mean_square = ctx.saved_tensors
        dtype = mean_square.dtype
        W = weight.shape[0]
        r = torch.rsqrt(mean_square + ctx.eps)
        w_W = weight.to(dtype)

        g = torch.sigmoid(gate.to(dtype))
        dx = g * dy
        u = dx * x
        u_RW, r_R = u.reshape(-1, W), r.reshape(-1)
        dw_W = u_RW.mT @ r_R
        d_mean_square = (u_RW @ w_W).view(r.shape) * r.pow(3) * -0.5
        dx.mul_(w_W).mul_(r)
        dgate = u.mul_(w_W).mul_(r).mul_(g.neg_().add_(1))
        return (
            dx.to(x.dtype),
            dgate.to(gate.dtype),
            dw_W.to(weight.dtype),
            d_mean_square,
            None,
        )
