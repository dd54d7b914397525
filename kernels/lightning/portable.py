"""Lightning attention in chunks: plain PyTorch on any device, with a hand-written backward.

Inside a chunk the decayed scores are formed at once; between chunks only the state travels
(lightning attention, arXiv 2401.04658; the decays here are those of arXiv 2501.08313). Every decay
is `exp` of a number <= 0, so no slope is too steep. With q_i and S the state entering a chunk of L
tokens, i, j = 0..L-1:

    o_i = exp(-s (i + 1)) q_i S + sum_{j <= i} exp(-s (i - j)) (q_i . k_j) v_j
    S' = exp(-s L) S + sum_j exp(-s (L - 1 - j)) k_j v_j^T

Shapes: B rows, T tokens in a row, M chunks in a row, C tokens in a chunk, H heads, D key width,
Dv value width, N documents in a row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.lightning.chunks import Chunks

LONG_CHUNK, SHORT_CHUNK = 64, 32
LONG_DOCUMENT = 512
"""Work grows with the chunk, and so does the filling of a document's last one; the number of states
and the efficiency of a product ask for a long one. The break-even was measured on a CPU for widths
of 32 to 128."""


def lightning_attention_portable(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHDv: Tensor,
    decay_H: Tensor,
    bounds: list[int] | None,
    initial_state_NHDDv: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`lightning_attention` in chunks. Arguments are checked by the caller.

    Keeps q, k, v and one state per chunk for the backward. The order of every sum is fixed, so
    equal inputs give equal bits.
    """
    tokens = q_BTHD.shape[1]
    bounds = bounds or [0, tokens]
    is_long = tokens >= LONG_DOCUMENT * (len(bounds) - 1)
    chunk = LONG_CHUNK if is_long else SHORT_CHUNK
    chunks = Chunks.of_documents(bounds, chunk, q_BTHD.device)
    o_BTHDv, final_state_NHDDv = _Lightning.apply(
        q_BTHD, k_BTHD, v_BTHDv, decay_H.detach(), initial_state_NHDDv, chunks, return_final_state
    )
    return o_BTHDv, final_state_NHDDv


class _Decays(NamedTuple):
    """All decay factors, the only place where `exp` is taken."""

    scores_HCC: Tensor
    """exp(-s (i - j)) where j <= i, zero elsewhere."""
    queries_HC1: Tensor
    """exp(-s (i + 1)): from the state entering the chunk to query i."""
    keys_MHC1: Tensor
    """exp(-s (L - 1 - j)): from key j to the state leaving the chunk."""
    carry_MH11: Tensor
    """exp(-s L): from the state entering the chunk to the state leaving it."""


def _decays(decay_H: Tensor, chunks: Chunks, dtype: torch.dtype) -> _Decays:
    negative_H = -decay_H.to(dtype)
    step_C = torch.arange(chunks.size, device=decay_H.device)
    to_end_MC = (chunks.lengths_M[:, None] - 1 - step_C).clamp(min=0)
    distance_CC = (step_C[:, None] - step_C).clamp(min=0)
    return _Decays(
        scores_HCC=torch.exp(negative_H[:, None, None] * distance_CC).tril(),
        queries_HC1=torch.exp(negative_H[:, None] * (step_C + 1))[..., None],
        keys_MHC1=torch.exp(negative_H[:, None] * to_end_MC[:, None])[..., None],
        carry_MH11=torch.exp(negative_H * chunks.lengths_M[:, None])[..., None, None],
    )


class _Lightning(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHD: Tensor,
        k_BTHD: Tensor,
        v_BTHDv: Tensor,
        decay_H: Tensor,
        initial_state_NHDDv: Tensor | None,
        chunks: Chunks,
        return_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(q_BTHD.dtype, torch.float32)
        q, k, v = (chunks.split(x, dtype) for x in (q_BTHD, k_BTHD, v_BTHDv))
        decays = _decays(decay_H, chunks, dtype)
        added = _product((k * decays.keys_MHC1).mT, v)
        entering = _carry(added, decays.carry_MH11, initial_state_NHDDv, chunks.first_N, step=1)
        final_state = None
        if return_final_state:
            final_state = _leave(entering, added, decays.carry_MH11, chunks.last_N)
        o = _product(q, entering).mul_(decays.queries_HC1)
        _add_product(o, _product(q, k.mT).mul_(decays.scores_HCC), v)
        ctx.save_for_backward(q_BTHD, k_BTHD, v_BTHDv, decay_H, entering)
        ctx.chunks = chunks
        ctx.has_initial_state = initial_state_NHDDv is not None
        ctx.set_materialize_grads(False)
        return chunks.join(o, v_BTHDv.dtype), final_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do_BTHDv: Tensor | None, d_final_state_NHDDv: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q_BTHD, k_BTHD, v_BTHDv, decay_H, entering = ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        if do_BTHDv is None:
            do_BTHDv = torch.zeros_like(v_BTHDv)
        q, k, v, do = (chunks.split(x, entering.dtype) for x in (q_BTHD, k_BTHD, v_BTHDv, do_BTHDv))
        decays = _decays(decay_H, chunks, entering.dtype)

        do_decayed = do * decays.queries_HC1
        d_entering = _product(q.mT, do_decayed)
        carry = decays.carry_MH11
        d_leaving = _carry(d_entering, carry, d_final_state_NHDDv, chunks.last_N, step=-1)
        d_initial_state = None
        if ctx.has_initial_state:
            d_initial_state = _leave(d_leaving, d_entering, carry, chunks.first_N)
        dq = _product(do_decayed, entering.mT)
        dk = _product(v, d_leaving.mT).mul_(decays.keys_MHC1)
        dv = _product(k, d_leaving).mul_(decays.keys_MHC1)

        scores = _product(q, k.mT).mul_(decays.scores_HCC)
        _add_product(dv, scores.mT, do)
        d_scores = _product(do, v.mT, out=scores).mul_(decays.scores_HCC)
        _add_product(dq, d_scores, k)
        _add_product(dk, d_scores.mT, q)
        return (
            chunks.join(dq, q_BTHD.dtype),
            chunks.join(dk, k_BTHD.dtype),
            chunks.join(dv, v_BTHDv.dtype),
            None,
            d_initial_state,
            None,
            None,
        )


def _carry(
    added_BMHDDv: Tensor,
    carry_MH11: Tensor,
    outer_NHDDv: Tensor | None,
    starts_N: list[int],
    step: int,
) -> Tensor:
    """Carry the state from chunk to chunk: `[B, M, H, D, Dv]` that enters each chunk.

    `starts_N` are the chunks where a document is entered, with `outer_NHDDv` or zero. The backward
    enters documents at their end and walks with `step` -1.
    """
    entering_BMHDDv = torch.zeros_like(added_BMHDDv)
    if outer_NHDDv is not None:
        outer_BNHDDv = outer_NHDDv.unflatten(0, (-1, len(starts_N)))
        entering_BMHDDv[:, starts_N] = outer_BNHDDv.to(entering_BMHDDv.dtype)
    added, carry, entering = added_BMHDDv.unbind(1), carry_MH11.unbind(0), entering_BMHDDv.unbind(1)
    starts = set(starts_N)
    for m in range(len(added))[::step]:
        if m not in starts:
            before = m - step
            torch.addcmul(added[before], carry[before], entering[before], out=entering[m])
    return entering_BMHDDv


def _leave(
    entering_BMHDDv: Tensor, added_BMHDDv: Tensor, carry_MH11: Tensor, ends_N: list[int]
) -> Tensor:
    """The states `[B*N, H, D, Dv]` that leave the documents at the chunks `ends_N`."""
    entering, added = (x[:, ends_N] for x in (entering_BMHDDv, added_BMHDDv))
    return added.addcmul_(carry_MH11[ends_N], entering).flatten(0, 1)


def _product(a_BMHXY: Tensor, b_BMHYZ: Tensor, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = a_BMHXY.new_empty(*a_BMHXY.shape[:-1], b_BMHYZ.shape[-1])
    torch.bmm(a_BMHXY.flatten(0, 2), b_BMHYZ.flatten(0, 2), out=out.flatten(0, 2))
    return out


def _add_product(total_BMHXZ: Tensor, a_BMHXY: Tensor, b_BMHYZ: Tensor) -> None:
    total_BMHXZ.flatten(0, 2).baddbmm_(a_BMHXY.flatten(0, 2), b_BMHYZ.flatten(0, 2))
