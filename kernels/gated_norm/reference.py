"""The gated RMSNorm as its formula, differentiable by autograd itself."""

import torch
from torch import Tensor


def sum_of_squares(x: Tensor) -> Tensor:
    """`sum_of_squares` of `[..., W]`."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1, keepdim=True)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, mean_square: Tensor | None, eps: float
) -> Tensor:
    """`gated_rms_norm` of `[..., W]`. Arguments are checked by the caller."""
    if mean_square is None:
        mean_square = sum_of_squares(x) / x.shape[-1]
    dtype = mean_square.dtype
    normed = x.to(dtype) * torch.rsqrt(mean_square + eps) * weight.to(dtype)
    return (normed * torch.sigmoid(gate.to(dtype))).to(x.dtype)
