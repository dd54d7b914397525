"""Causal softmax attention over a packed row that is cut over the ranks of a group.

A rank attends to its own segments first, then step by step to the keys of other ranks, which travel
while it computes. Each document's offset says which queries see a received key: those in later
pieces, so a step is a few full rectangles, without a mask. The backward receives the keys again and
sends their float32 gradients back.

Source: the varlen ring attention of MiniMax-01 (arXiv 2501.08313, section 3.2). Keys go straight to
the ranks that need them rather than from neighbour to neighbour: documents on one rank cost no
messages, and no rank waits until others have computed.

Shapes: T tokens of the local row, S received keys, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.exchange import Transfer, swap
from parallel.partial_attention import (
    Options,
    PartialGradients,
    attend_rectangles,
    attend_segments,
)
from parallel.ring_plan import RingPlan, RingStep


def ring_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    plan: RingPlan,
    group: dist.ProcessGroup,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`softmax(scale q k^T) v` over the earlier tokens of each query's document, wherever they are.

    Args:
        q_THD, k_TKD, v_TKD: of this rank's tokens, H a multiple of K.
        plan: for this rank of `group`, of the cut by which the tokens were taken.
        scale, backend: as in `kernels.attention.varlen_attention`.

    Returns:
        `[T, H, D]` in q's dtype. Gradients reach q, k and v of all ranks.
    """
    options = Options(q_THD.shape[2] ** -0.5 if scale is None else scale, backend)
    return _RingAttention.apply(q_THD, k_TKD, v_TKD, plan, group, options)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: RingPlan,
        group: dist.ProcessGroup,
        options: Options,
    ) -> Tensor:
        received = _ReceivedKeys(k, v, plan.steps, group)
        out, lse = attend_segments(q, k, v, plan.bounds, options)
        attend_rectangles(out, lse, q, k, v, plan.own, options)
        for step, k_in, v_in in received:
            attend_rectangles(out, lse, q, k_in, v_in, step.rectangles, options)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.group, ctx.options = plan, group, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        received = _ReceivedKeys(k, v, ctx.plan.steps, ctx.group)
        gradients = PartialGradients(d_out, q, out, lse, ctx.options)
        dk, dv = gradients.of_segments(k, v, ctx.plan.bounds)
        gradients.add_rectangles(k, v, ctx.plan.own, dk, dv)
        key_gradients = _KeyGradients(dk, dv, ctx.group)
        for step, k_in, v_in in received:
            d_kv = _empty_kv(dk, step.incoming).zero_()
            gradients.add_rectangles(k_in, v_in, step.rectangles, *d_kv.chunk(2, dim=1))
            key_gradients.send(step, d_kv)
        key_gradients.finish()
        return gradients.dq_THD.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


class _ReceivedKeys:
    """The keys and values [S, K, D] of other ranks, step by step; those of the next step are under
    way while one is computed with. The first are sent at once."""

    def __init__(
        self, k: Tensor, v: Tensor, steps: Sequence[RingStep], group: dist.ProcessGroup
    ) -> None:
        self._k, self._v, self._steps, self._group = k, v, steps, group
        self._under_way = self._send(0)

    def _send(self, index: int) -> Transfer | None:
        if index == len(self._steps):
            return None
        step, k, v = self._steps[index], self._k, self._v
        outgoing, incoming = _empty_kv(k, step.sent), _empty_kv(k, step.incoming)
        places = outgoing.split([part.stop - part.start for part in step.outgoing])
        for place, part in zip(places, step.outgoing, strict=True):
            torch.cat((k[part], v[part]), dim=1, out=place)
        return swap(self._group, (step.target, outgoing), (step.source, incoming))

    def __iter__(self) -> Iterator[tuple[RingStep, Tensor, Tensor]]:
        for index, step in enumerate(self._steps):
            assert self._under_way is not None
            kv = self._under_way.wait()
            self._under_way = self._send(index + 1)
            yield step, *kv.chunk(2, dim=1)


class _KeyGradients:
    """The gradients of received keys and values on their way to the ranks that own them, while the
    next are computed; those of keys of this rank are added to `dk` and `dv`."""

    def __init__(self, dk: Tensor, dv: Tensor, group: dist.ProcessGroup) -> None:
        self._dk, self._dv, self._group = dk, dv, group
        self._under_way: tuple[RingStep, Transfer] | None = None

    def send(self, step: RingStep, d_kv: Tensor) -> None:
        self.finish()
        own = _empty_kv(self._dk, step.sent)
        transfer = swap(self._group, (step.source, d_kv), (step.target, own))
        self._under_way = step, transfer

    def finish(self) -> None:
        if self._under_way:
            step, transfer = self._under_way
            d_kv = transfer.wait().split([part.stop - part.start for part in step.outgoing])
            for part, added in zip(step.outgoing, d_kv, strict=True):
                dk, dv = added.chunk(2, dim=1)
                self._dk[part] += dk
                self._dv[part] += dv
            self._under_way = None


def _empty_kv(k: Tensor, tokens: int) -> Tensor:
    return k.new_empty(tokens, 2 * k.shape[1], k.shape[2])
