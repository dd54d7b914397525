"""The product of few rows with a matrix: what a step of decoding consists of.

A CPU's library divides a product among threads, and fills its vectors, along the rows of the result
only. With the matrix on the left the few rows become columns, and the many columns rows.

Shapes: N rows, C and F columns.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

FEW, LARGE = 8, 2**20
"""Up to FEW rows, and up to 8 FEW where the matrix has LARGE elements, this was measured to be
faster on a CPU. Of one row it is the same."""


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` without gradients: `[..., C]` and `[F, C]` to `[..., F]`, contiguous."""
    rows = x.numel() // max(x.shape[-1], 1)
    few = FEW if weight.numel() < LARGE else 8 * FEW
    if x.device.type != "cpu" or not 1 < rows <= few:
        return linear(x, weight)
    y_FN = torch.mm(weight, x.reshape(rows, -1).t())
    return y_FN.t().contiguous().view(*x.shape[:-1], -1)
