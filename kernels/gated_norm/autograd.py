"""The gated RMSNorm as autograd functions, whatever backend computes them.

Shapes: x, gate and y are `[..., W]`, W the channels held here.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Backend(Protocol):
    """How the norm is computed. Arguments are checked by the caller; all but them is recomputed."""

    def sum_of_squares(self, x: Tensor, /) -> Tensor:
        """`[..., 1]` in float32 (float64 for float64 x)."""
        ...

    def sum_of_squares_backward(self, d_sum: Tensor, x: Tensor, /) -> Tensor: ...

    def forward(
        self, x: Tensor, gate: Tensor, weight: Tensor, mean_square: Tensor | None, eps: float, /
    ) -> tuple[Tensor, Tensor]:
        """y and the mean square `[..., 1]`, that of x where none is given."""
        ...

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        gate: Tensor,
        weight: Tensor,
        mean_square: Tensor,
        eps: float,
        whole: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dx, dgate, dweight and dmean_square.

        With `whole`, `mean_square` is that of x: its gradient is a part of dx, and None.
        """
        ...


class SumOfSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backend = backend
        return backend.sum_of_squares(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor, None]:
        return ctx.backend.sum_of_squares_backward(d_sum, *ctx.saved_tensors), None


class GatedRMSNorm(torch.autograd.Function):
    """Keeps its inputs, and one number a row where the mean square is not among them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        weight: Tensor,
        mean_square: Tensor | None,
        eps: float,
        backend: Backend,
    ) -> Tensor:
        y, used = backend.forward(x, gate, weight, mean_square, eps)
        ctx.save_for_backward(x, gate, weight, used)
        ctx.eps, ctx.backend, ctx.whole = eps, backend, mean_square is None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.backend.backward(dy, *ctx.saved_tensors, ctx.eps, ctx.whole)
        return (*grads, None, None)
