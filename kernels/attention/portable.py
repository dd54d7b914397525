"""Packed causal attention in linear memory: PyTorch's flash kernel on a CPU, blocks elsewhere.

Neighbouring documents of one length are computed together, so a row of equal documents is one call.

Shapes: T tokens in the row, H query heads, K key/value heads, D head width; a run has N documents
of L tokens.
"""

from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import kernels.attention.blockwise as blockwise
import kernels.attention.cpu_flash as cpu_flash


def varlen_attention_portable(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, bounds: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """`varlen_attention`, keeping q, k, v, the output and its log-sum-exp for the backward.

    Arguments are checked by the caller; `bounds` are the document borders.
    """
    return _VarlenAttention.apply(q_THD, k_TKD, v_TKD, _runs(bounds), scale)


Run = tuple[slice, int]
"""Where neighbouring documents of one length lie in the row, and that length."""


def _runs(bounds: list[int]) -> list[Run]:
    runs = []
    begin = 0
    for length, group in groupby(end - start for start, end in pairwise(bounds)):
        end = begin + sum(group)
        if length:
            runs.append((slice(begin, end), length))
        begin = end
    return runs


def _documents(x_THD: Tensor, run: Run) -> Tensor:
    """The `[N, H, L, D]` view of a run in a `[T, H, D]` row."""
    span, length = run
    return x_THD[span].unflatten(0, (-1, length)).transpose(1, 2)


def _document_lse(lse_HT: Tensor, run: Run) -> Tensor:
    """The `[N, H, L]` view of a run in `[H, T]`."""
    span, length = run
    return lse_HT[:, span].unflatten(1, (-1, length)).transpose(0, 1)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, runs: list[Run], scale: float
    ) -> tuple[Tensor, Tensor]:
        kernel = cpu_flash if q_THD.device.type == "cpu" else blockwise
        T, H, _ = q_THD.shape
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        lse_dtype = torch.promote_types(q_THD.dtype, torch.float32)
        lse_HT = torch.empty(H, T, dtype=lse_dtype, device=q_THD.device)
        for run in runs:
            q, k, v = (_documents(x, run) for x in (q_THD, k_TKD, v_TKD))
            out, lse = kernel.forward(q, k, v, scale)
            _documents(out_THD, run).copy_(out)
            _document_lse(lse_HT, run).copy_(lse)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, lse_HT)
        ctx.kernel, ctx.runs, ctx.scale = kernel, runs, scale
        ctx.set_materialize_grads(False)
        return out_THD, lse_HT

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_out_THD: Tensor | None, d_lse_HT: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q_THD, k_TKD, v_TKD, out_THD, lse_HT = ctx.saved_tensors
        if d_out_THD is None:
            d_out_THD = torch.zeros_like(out_THD)
        grads = [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (q_THD, k_TKD, v_TKD)
        ]
        for run in ctx.runs:
            q, k, v, out, d_out = (
                _documents(x, run) for x in (q_THD, k_TKD, v_TKD, out_THD, d_out_THD)
            )
            lse = _document_lse(lse_HT, run)
            d_lse = None if d_lse_HT is None else _document_lse(d_lse_HT, run)
            parts = ctx.kernel.backward(d_out, d_lse, q, k, v, out, lse, ctx.scale)
            for grad, part in zip(grads, parts, strict=True):
                _documents(grad, run).copy_(part)
        return (*grads, None, None)
