"""The plain twin of `parallel.varlen_ring`: all keys come to all ranks at once.

Shapes: T tokens of the local row, R ranks, S = R * T tokens of the whole row, H query heads, K
key/value heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.cut import Cut
from parallel.exchange import all_gather, reduce_scatter
from parallel.partial_attention import (
    Options,
    PartialGradients,
    Rectangle,
    attend_rectangles,
    attend_segments,
)


def gathered_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cut: Cut,
    group: dist.ProcessGroup,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`ring_attention` by an all-gather of keys and values, and in the backward a reduce-scatter of
    their gradients in float32. Arguments and result as there, but for the cut itself."""
    options = Options(q_THD.shape[2] ** -0.5 if scale is None else scale, backend)
    return _GatheredAttention.apply(q_THD, k_TKD, v_TKD, cut, group, options)


def earlier_keys(cut: Cut, rank: int) -> list[Rectangle]:
    """The local queries whose document begins in another piece, and its keys before theirs."""
    return [
        Rectangle(span.local, slice(spans[0].begin, span.begin))
        for spans in cut.crossings
        for span in spans[1:]
        if span.rank == rank
    ]


def _whole_row(k: Tensor, v: Tensor, cut: Cut, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Keys and values `[S, K, D]` in the order of the row."""
    gathered = all_gather(group, torch.cat((k, v), dim=1)).wait()
    return cut.join(gathered.unbind()).chunk(2, dim=1)


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cut: Cut,
        group: dist.ProcessGroup,
        options: Options,
    ) -> Tensor:
        rank = group.rank()
        out, lse = attend_segments(q, k, v, cut.local_bounds(rank), options)
        k_row, v_row = _whole_row(k, v, cut, group)
        attend_rectangles(out, lse, q, k_row, v_row, earlier_keys(cut, rank), options)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.cut, ctx.group, ctx.options = cut, group, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        cut, group, rank = ctx.cut, ctx.group, ctx.group.rank()
        gradients = PartialGradients(d_out, q, out, lse, ctx.options)
        dk, dv = gradients.of_segments(k, v, cut.local_bounds(rank))
        k_row, v_row = _whole_row(k, v, cut, group)
        d_kv_row = dk.new_zeros(k_row.shape[0], 2 * k.shape[1], k.shape[2])
        gradients.add_rectangles(k_row, v_row, earlier_keys(cut, rank), *d_kv_row.chunk(2, dim=1))
        parts = torch.stack([cut.take(d_kv_row, other) for other in range(cut.ranks)])
        dk_elsewhere, dv_elsewhere = reduce_scatter(group, parts).wait().chunk(2, dim=1)
        dk, dv = (dk + dk_elsewhere).to(k.dtype), (dv + dv_elsewhere).to(v.dtype)
        return gradients.dq_THD.to(q.dtype), dk, dv, None, None, None
