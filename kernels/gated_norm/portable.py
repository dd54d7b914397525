"""The gated RMSNorm in plain PyTorch, on any device.

With r = rsqrt(mean_square + eps), g = sigmoid(gate) and v = dy g w x r, all of one row of W:

    dx = dy g w r,  dgate = v (1 - g),  dmean_square = -r^2 / 2 * sum(v),
    dw = sum of dy g x r over the rows.

Where the mean square is that of x itself, dx is less by x r^2 * sum(v) / W.
Shapes: R rows, W channels.
"""

import torch
from torch import Tensor

from kernels.autocast import without_autocast


def sum_of_squares(x: Tensor) -> Tensor:
    """See `kernels.gated_norm.autograd.Backend`. One pass, and nothing as large as x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square_()


def sum_of_squares_backward(d_sum: Tensor, x: Tensor) -> Tensor:
    return (x * (2 * d_sum)).to(x.dtype)


def forward(
    x: Tensor, gate: Tensor, weight: Tensor, mean_square: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.gated_norm.autograd.Backend`."""
    if mean_square is None:
        mean_square = sum_of_squares(x) / x.shape[-1]
    y = torch.sigmoid(gate.to(mean_square.dtype)).mul_(x)
    y = y.mul_(torch.rsqrt(mean_square + eps)).mul_(weight).to(x.dtype)
    return y, mean_square


@without_autocast
def backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    mean_square: Tensor,
    eps: float,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `kernels.gated_norm.autograd.Backend`."""
    dtype = mean_square.dtype
    W = weight.shape[0]
    r = torch.rsqrt(mean_square + eps)
    w_W = weight.to(dtype)

    g = torch.sigmoid(gate.to(dtype))
    dx = g * dy
    u = dx * x
    u_RW, r_R = u.reshape(-1, W), r.reshape(-1)
    dw_W = u_RW.mT @ r_R
    # Not r^3: it underflows for rows whose squares do not overflow.
    d_mean_square = (u_RW @ w_W).view(r.shape).mul_(r).mul_(r).mul_(r).mul_(-0.5)
    dx.mul_(w_W).mul_(r)
    if whole:
        dx.addcmul_(x.to(dtype), d_mean_square, value=2 / W)
    dgate = u.mul_(w_W).mul_(r).mul_(g.neg_().add_(1))
    return (
        dx.to(x.dtype),
        dgate.to(gate.dtype),
        dw_W.to(weight.dtype),
        None if whole else d_mean_square,
    )
