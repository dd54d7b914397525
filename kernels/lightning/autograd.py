"""Lightning attention as one autograd function, whatever backend computes it.

A backend is a module with the four plain functions of `Backend`. This is the only place that knows
what is kept for the backward and where gradients are written.

Shapes: B batch, T tokens, H heads, D key width, Dv value width, N documents.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Backend(Protocol):
    """How lightning attention is computed. Arguments are checked by the caller.

    `q`, `k` `[B, T, H, D]`, `v`, `d_o` `[B, T, H, Dv]` of any strides, `decay` `[H]` float32,
    states `[N, H, D, Dv]` float32 (float64 for float64 inputs). `cu_seqlens` lies on the host or
    with q. With `silu`, q, k and v are given, and their gradients asked for, before their SiLU.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        cu_seqlens: Tensor | None,
        initial_state: Tensor | None,
        return_final_state: bool,
        silu: bool,
        keep_states: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The output, the final state where asked for, and what to keep for the backward."""
        ...

    def backward(
        self,
        d_o: Tensor | None,
        d_final_state: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        cu_seqlens: Tensor | None,
        initial_state: Tensor | None,
        states: Tensor | None,
        silu: bool,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        need_initial: bool,
    ) -> Tensor | None:
        """Write `dq`, `dk` and `dv`, of any strides; return `d_initial_state` where needed."""
        ...

    def state(
        self, k: Tensor, v: Tensor, decay: Tensor, cu_seqlens: Tensor | None, silu: bool
    ) -> Tensor:
        """The state after each document that starts from zero."""
        ...

    def state_gradient(
        self, q: Tensor, d_o: Tensor, decay: Tensor, cu_seqlens: Tensor | None, silu: bool
    ) -> Tensor:
        """The gradient that the outputs of each document give to the state before it."""
        ...


class Options(NamedTuple):
    """What of a call is not a tensor."""

    backend: Backend
    return_final_state: bool
    silu: bool
    is_recorded: bool
    """Whether a backward may follow: autograd alone knows, and not inside its own function."""


def apply(
    qkv: tuple[Tensor, ...],
    decay: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """`o` and the final state (None where not asked for), differentiable in `qkv` and
    `initial_state`. `qkv` is q, k and v, or one tensor `[B, T, H, 3 D]` with the three side by
    side; its gradient then is one such tensor too, written in place."""
    return _Lightning.apply(options, decay.detach(), cu_seqlens, initial_state, *qkv)


def views(qkv: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a fused or separate `qkv`, without a copy."""
    q, k, v = qkv if len(qkv) == 3 else qkv[0].chunk(3, dim=-1)
    return q, k, v


class _Lightning(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        decay_H: Tensor,
        cu_seqlens: Tensor | None,
        initial_state_NHDDv: Tensor | None,
        *qkv: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        backend, return_final_state, silu, is_recorded = options
        o_BTHDv, final_state_NHDDv, states = backend.forward(
            *views(qkv),
            decay_H,
            cu_seqlens,
            initial_state_NHDDv,
            return_final_state,
            silu,
            keep_states=is_recorded and any(ctx.needs_input_grad),
        )
        ctx.save_for_backward(decay_H, cu_seqlens, initial_state_NHDDv, states, *qkv)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return o_BTHDv, final_state_NHDDv

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_o_BTHDv: Tensor | None, d_final_state_NHDDv: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        decay_H, cu_seqlens, initial_state_NHDDv, states, *qkv = ctx.saved_tensors
        backend, _, silu, _ = ctx.options
        d_qkv = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in qkv)
        d_initial_state_NHDDv = backend.backward(
            d_o_BTHDv,
            d_final_state_NHDDv,
            *views(qkv),
            decay_H,
            cu_seqlens,
            initial_state_NHDDv,
            states,
            silu,
            *views(d_qkv),
            need_initial=ctx.needs_input_grad[3],
        )
        return None, None, None, d_initial_state_NHDDv, *d_qkv
