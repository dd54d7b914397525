"""Lightning attention over a packed row that is cut over the ranks of a group.

Each rank computes the states that its cut documents leave at the edges of its pieces, one
all-gather brings them to all ranks, and each sums up what enters its own pieces:

    S_in = sum over the spans before of exp(-s tokens in between) T_span

in float32 and in the order of the row. The decays are known from lengths and are not sent. Then the
output pass starts from the right states, segment by segment of cut documents; all that lies between
them is one call without states. The backward is the mirror image, with the gradients that
the outputs of a span give to the state that entered it.

Source: LASP+ of MiniMax-01 (arXiv 2501.08313, section 3.2). What travels does not grow with T.

Shapes: B = 1, T tokens of the local row, H heads, D head width, R ranks, S states that a rank
sends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.lightning import (
    lightning_attention,
    lightning_attention_qkv,
    lightning_backward,
    lightning_forward,
    lightning_state,
    lightning_state_gradient,
    views,
)
from parallel.exchange import all_gather
from parallel.state_plan import PrefixSums, StatePlan, Stretch

Entering = dict[int, Tensor]
"""The state [1, H, D, D] that enters a segment, for those that one enters."""
Exchange = Callable[[PrefixSums, Tensor, Tensor, dist.ProcessGroup], Callable[[], Entering]]
"""From the states [S, H, D, D] that this rank sends and the decay [H], to what enters; the call
starts the exchange and what it returns ends it."""


def gather_states(
    sums: PrefixSums, sent_SHDD: Tensor, decay_H: Tensor, group: dist.ProcessGroup
) -> Callable[[], Entering]:
    """LASP+: one all-gather of the states of all ranks, and a decayed prefix sum on each."""
    transfer = all_gather(group, sent_SHDD)

    def entering() -> Entering:
        return prefix_sums(sums, transfer.wait(), decay_H.to(sent_SHDD.dtype))

    return entering


def prefix_sums(sums: PrefixSums, gathered_RSHDD: Tensor, decay_H: Tensor) -> Entering:
    entering = {}
    for terms in sums.documents:
        state_HDD = torch.zeros_like(gathered_RSHDD[0, 0])
        mine = [index for index, term in enumerate(terms) if term.segment is not None]
        for index, term in enumerate(terms[: mine[-1] + 1] if mine else []):
            if term.segment is not None and index > 0:
                entering[term.segment] = state_HDD[None]
            if term.slot is not None:
                kept_H11 = torch.exp(decay_H * -term.tokens)[:, None, None]
                added_HDD = gathered_RSHDD[term.rank, term.slot]
                state_HDD = torch.addcmul(added_HDD, kept_H11, state_HDD)
    return entering


class Lasp:
    """Lightning attention of one cut row, whose states are under way between `begin` and `finish`.

    What is computed in between overlaps with the exchange, in the backward as well: autograd comes
    to it after `finish`, where the gradients of states depart, and before `begin`, where they are
    needed.
    """

    @classmethod
    def begin(
        cls,
        *heads: Tensor,
        decay: Tensor,
        plan: StatePlan,
        group: dist.ProcessGroup,
        cu_seqlens: Tensor | None = None,
        silu: bool = False,
        backend: str = "auto",
        exchange: Exchange = gather_states,
    ) -> Lasp:
        """Compute the states that this rank is to send, and send them.

        Args:
            heads: q, k and v `[1, T, H, D]`, or one `[1, T, H, 3 D]` with those of a head side by
                side, of this rank's tokens.
            decay, silu, backend: as in `kernels.lightning.lightning_attention`.
            plan: for this rank of `group`, of the cut by which the tokens were taken.
            cu_seqlens: the plan's bounds `[N+1]` int32, where they lie on the device already.
            exchange: how states reach other ranks.
        """
        if cu_seqlens is None:
            cu_seqlens = torch.tensor(plan.bounds, dtype=torch.int32)
        options = {"silu": silu, "backend": backend}
        return cls(heads, decay, plan, group, cu_seqlens, exchange, options)

    def __init__(
        self,
        heads: tuple[Tensor, ...],
        decay: Tensor,
        plan: StatePlan,
        group: dist.ProcessGroup,
        cu_seqlens: Tensor,
        exchange: Exchange,
        options: dict[str, Any],
    ) -> None:
        self._decay, self._plan, self._group = decay, plan, group
        self._cu_seqlens, self._exchange, self._options = cu_seqlens, exchange, options
        self._is_recorded = torch.is_grad_enabled() and any(x.requires_grad for x in heads)
        self._heads = heads
        self._states: Sequence[Tensor | None] = ()
        if plan.forward.slots:
            self._stand_in = _Begin.apply(self, *heads)

    def finish(self) -> Tensor:
        """The output `[1, T, H, D]`. Gradients reach the heads of all ranks. Call it once."""
        heads, self._heads = self._heads, ()
        if self._plan.forward.slots:
            stand_in, self._stand_in = self._stand_in, None
            return _Finish.apply(self, stand_in, *(x.detach() for x in heads))
        attend: Callable[..., Tensor] = (
            lightning_attention_qkv if len(heads) == 1 else lightning_attention
        )
        return attend(*heads, self._decay, cu_seqlens=self._cu_seqlens, **self._options)

    def _send_states(self) -> None:
        _, k, v = views(self._heads)
        self._send(self._plan.forward, k, v, lightning_state)

    def _outputs(self, heads: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """The output; for each stretch, the state that enters it and what its backward needs."""
        entering = self._received()
        outputs: list[Tensor] = []
        states: list[Tensor | None] = []
        for stretch in self._plan.stretches:
            tokens = self._plan.tokens(stretch.first, stretch.last)
            state_1HDD = entering.get(stretch.first)
            o, kept = lightning_forward(
                [x[:, tokens] for x in heads],
                self._decay,
                cu_seqlens=self._bounds_of(stretch),
                initial_state=state_1HDD,
                keep_states=self._is_recorded,
                **self._options,
            )
            outputs.append(o)
            states += [state_1HDD, kept]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), states

    def _send_state_gradients(
        self, d_o: Tensor, heads: tuple[Tensor, ...], states: Sequence[Tensor | None]
    ) -> None:
        self._heads, self._states = heads, states
        q, _, _ = views(heads)
        self._send(self._plan.backward, q, d_o, lightning_state_gradient)

    def _gradients(self, d_o: Tensor) -> tuple[Tensor, ...]:
        leaving = self._received()
        heads, self._heads = self._heads, ()
        states, self._states = self._states, ()
        d_heads = tuple(x.new_empty(x.shape) for x in heads)
        for stretch, state_1HDD, kept in zip(
            self._plan.stretches, states[::2], states[1::2], strict=True
        ):
            tokens = self._plan.tokens(stretch.first, stretch.last)
            lightning_backward(
                d_o[:, tokens],
                [x[:, tokens] for x in heads],
                [dx[:, tokens] for dx in d_heads],
                self._decay,
                kept,
                cu_seqlens=self._bounds_of(stretch),
                initial_state=state_1HDD,
                d_final_state=leaving.get(stretch.first),
                **self._options,
            )
        return d_heads

    def _bounds_of(self, stretch: Stretch) -> Tensor | None:
        """`cu_seqlens` of its segments, where it has several."""
        if stretch.last - stretch.first == 1:
            return None
        begin = self._plan.bounds[stretch.first]
        return self._cu_seqlens[stretch.first : stretch.last + 1] - begin

    def _send(
        self, sums: PrefixSums, a: Tensor, b: Tensor, state_of: Callable[..., Tensor]
    ) -> None:
        """Start the exchange of the states that `state_of` makes from two rows of heads."""
        dtype = torch.promote_types(a.dtype, torch.float32)
        sent_SHDD = a.new_zeros(sums.slots, *a.shape[2:], b.shape[3], dtype=dtype)
        for slot, segment in enumerate(sums.sent):
            tokens = self._plan.tokens(segment, segment + 1)
            state_1HDD = state_of(a[:, tokens], b[:, tokens], self._decay, **self._options)
            sent_SHDD[slot] = state_1HDD[0]
        self._entering = self._exchange(sums, sent_SHDD, self._decay, self._group)

    def _received(self) -> Entering:
        entering = self._entering()
        del self._entering  # it holds the states of all ranks
        return entering


class _Begin(torch.autograd.Function):
    """The states depart; in the backward, all gradients are computed here."""

    @staticmethod
    def forward(ctx: Any, lasp: Lasp, *heads: Tensor) -> Tensor:
        ctx.lasp = lasp
        lasp._send_states()
        _, _, v = views(heads)
        # Stands for the output, whose gradient arrives through it.
        return v.new_empty(()).expand(v.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.lasp._gradients(d_o)


class _Finish(torch.autograd.Function):
    """The states arrive; in the backward, their gradients depart."""

    @staticmethod
    def forward(ctx: Any, lasp: Lasp, stand_in: Tensor, *heads: Tensor) -> Tensor:
        out, states = lasp._outputs(heads)
        ctx.lasp, ctx.kinds = lasp, len(heads)
        ctx.save_for_backward(*heads, *states)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        heads, states = saved[: ctx.kinds], saved[ctx.kinds :]
        ctx.lasp._send_state_gradients(d_o, heads, states)
        return None, d_o, *(None for _ in heads)
