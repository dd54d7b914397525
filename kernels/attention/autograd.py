"""Gradients of attention through its output and its log-sum-exp, by any backend's two passes."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention.segments import Segments


class Backend(Protocol):
    """What a backend's module holds. Shapes as in `attention_forward`; arguments are checked."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        scale: float,
        out_dtype: torch.dtype,
        /,
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        d_lse: Tensor | None,
        segments: Segments,
        scale: float,
        grad_dtype: torch.dtype,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Attention(torch.autograd.Function):
    """Keeps q, k, v, the output and its log-sum-exp for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backend: Backend,
        segments: Segments,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        out, lse = backend.forward(q, k, v, segments, scale, q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backend, ctx.segments, ctx.scale = backend, segments, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros_like(out)
        grads = ctx.backend.backward(
            d_out, q, k, v, out, lse, d_lse, ctx.segments, ctx.scale, q.dtype
        )
        return (*grads, None, None, None)
