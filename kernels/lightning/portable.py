"""Lightning attention in segments of chunks: plain PyTorch on any device.

With q_i, k_j, v_j the tokens of chunk m, i, j = 0..C-1, and S_m the state that enters it
(arXiv 2401.04658; the decays are those of arXiv 2501.08313):

    o_i = exp(-s (i + 1)) q_i S_m + sum_{j <= i} exp(-s (i - j)) (q_i . k_j) v_j
    A_m = sum_j exp(-s (C - 1 - j)) k_j v_j^T
    S_m = exp(-s C m) S_0 + sum_{n < m} exp(-s C (m - 1 - n)) A_n

The last line is one product for all chunks of a segment; from segment to segment the state is
carried. The backward walks the segments in reverse with the mirror image: the gradient of the state
that leaves chunk m gathers B_n = sum_i exp(-s (i + 1)) q_i do_i^T of the chunks n > m. It is handed
the state that entered each segment, and computes those of its chunks anew.

The tensors of a segment are written into the same memory each time, so that they stay in the cache
and no temporary grows with the row. The order of every sum is fixed: equal inputs give equal bits.

Shapes: B rows, T tokens in a row, M chunks in a segment, C tokens in a chunk, H heads (of a group),
Z = H * M chunks of all heads, D key width, Dv value width, N rows or documents with a state.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu as apply_silu

from kernels.lightning.chunks import Cut, Decays, Segment
from kernels.packed import document_bounds


@torch.no_grad()
def forward(
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
    """The output, the final states where asked for, and the state that entered each segment.

    Documents of one row that have states are walked one by one, and the backward is to compute what
    entered their segments anew: the third is then None.
    """
    with_states = initial_state is not None or return_final_state
    by_document = with_states and cu_seqlens is not None and cu_seqlens.numel() > 2
    cut = _cut(q, v, cu_seqlens, by_document)
    states = _running_states(initial_state, cut, q, v)
    kept = _kept_states(cut, states) if keep_states and not by_document else None
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for piece in _pieces(cut, decay, states):
        state_HDDv = piece.state(states)
        if kept is not None:
            piece.kept(kept).copy_(state_HDDv)
        q_ZCD, k_ZCD = piece.load("q", q, silu), piece.load("k", k, silu)
        v_ZCDv = piece.load("v", v, silu)
        _, entering_ZDDv = piece.enter(k_ZCD, v_ZCDv, state_HDDv)
        o_ZCDv = torch.bmm(q_ZCD, entering_ZDDv, out=piece.scratch("o", *v_ZCDv.shape))
        o_ZCDv.mul_(piece.decays.queries_ZC1)
        o_ZCDv.baddbmm_(piece.scores(q_ZCD, k_ZCD), v_ZCDv)
        piece.store(o_ZCDv, o)
    return o, states if return_final_state else None, kept


@torch.no_grad()
def backward(
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
    """Write `dq`, `dk` and `dv`; `states` are those that `forward` kept."""
    cut = _cut(q, v, cu_seqlens, by_document=states is None)
    if states is None:
        running = _running_states(initial_state, cut, q, v)
        states = _kept_states(cut, running)
        _walk_states(k, v, decay, cut, silu, running, states)
    if d_o is None:
        d_o = v.new_zeros(()).expand(v.shape)
    d_states = _running_states(d_final_state, cut, q, v)
    for piece in _pieces(cut, decay, d_states, reverse=True):
        k_ZCD, v_ZCDv = piece.load("k", k, silu), piece.load("v", v, silu)
        state_HDDv = piece.kept(states).clone()
        k_decayed, entering_ZDDv = piece.enter(k_ZCD, v_ZCDv, state_HDDv)
        q_ZCD, do_ZCDv = piece.load("q", q, silu), piece.load("do", d_o, silu=False)
        do_decayed, d_leaving_ZDDv = piece.leave(q_ZCD, do_ZCDv, piece.state(d_states))

        dq_ZCD = torch.bmm(do_decayed, entering_ZDDv.mT, out=piece.scratch("dq", *q_ZCD.shape))
        dv_ZCDv = torch.bmm(k_decayed, d_leaving_ZDDv, out=do_decayed)
        dk_ZCD = torch.bmm(v_ZCDv, d_leaving_ZDDv.mT, out=k_decayed)
        dk_ZCD.mul_(piece.decays.keys_ZC1)
        dv_ZCDv.baddbmm_(piece.scores(q_ZCD, k_ZCD).mT, do_ZCDv)
        piece.store_gradient(dv_ZCDv, v, silu, dv)
        d_scores_ZCC = piece.scores(do_ZCDv, v_ZCDv)
        dq_ZCD.baddbmm_(d_scores_ZCC, k_ZCD)
        piece.store_gradient(dq_ZCD, q, silu, dq)
        dk_ZCD.baddbmm_(d_scores_ZCC.mT, q_ZCD)
        piece.store_gradient(dk_ZCD, k, silu, dk)
    return d_states if need_initial else None


@torch.no_grad()
def state(k: Tensor, v: Tensor, decay: Tensor, cu_seqlens: Tensor | None, silu: bool) -> Tensor:
    """The state after each document that starts from zero."""
    cut = _cut(k, v, cu_seqlens, by_document=True)
    states = _running_states(None, cut, k, v)
    _walk_states(k, v, decay, cut, silu, states)
    return states


@torch.no_grad()
def state_gradient(
    q: Tensor, d_o: Tensor, decay: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """The gradient that the outputs of each document give to the state before it."""
    cut = _cut(q, d_o, cu_seqlens, by_document=True)
    d_states = _running_states(None, cut, q, d_o)
    for piece in _pieces(cut, decay, d_states, reverse=True):
        q_ZCD, do_ZCDv = piece.load("q", q, silu), piece.load("do", d_o, silu=False)
        piece.leave(q_ZCD, do_ZCDv, piece.state(d_states))
    return d_states


def _walk_states(
    k_BTHD: Tensor,
    v_BTHDv: Tensor,
    decay_H: Tensor,
    cut: Cut,
    silu: bool,
    states_NHDDv: Tensor,
    kept_SHDDv: Tensor | None = None,
) -> None:
    """Carry `states_NHDDv` from before the rows to after them, without outputs."""
    for piece in _pieces(cut, decay_H, states_NHDDv):
        state_HDDv = piece.state(states_NHDDv)
        if kept_SHDDv is not None:
            piece.kept(kept_SHDDv).copy_(state_HDDv)
        k_ZCD, v_ZCDv = piece.load("k", k_BTHD, silu), piece.load("v", v_BTHDv, silu)
        piece.enter(k_ZCD, v_ZCDv, state_HDDv)


def _cut(q_BTHD: Tensor, v_BTHDv: Tensor, cu_seqlens: Tensor | None, by_document: bool) -> Cut:
    bounds = None if cu_seqlens is None else document_bounds(cu_seqlens, q_BTHD.shape[1])
    return Cut.of(q_BTHD, max(q_BTHD.shape[3], v_BTHDv.shape[3]), bounds, by_document)


def _running_states(outer: Tensor | None, cut: Cut, q_BTHD: Tensor, v_BTHDv: Tensor) -> Tensor:
    """`[N, H, D, Dv]` of what enters the runs of `cut`, to be changed: `outer`, or zero."""
    if outer is not None:
        return outer.clone(memory_format=torch.contiguous_format)
    shape = cut.runs, *q_BTHD.shape[2:], v_BTHDv.shape[3]
    return q_BTHD.new_zeros(shape, dtype=torch.promote_types(q_BTHD.dtype, torch.float32))


def _kept_states(cut: Cut, states_NHDDv: Tensor) -> Tensor:
    return states_NHDDv.new_empty(len(cut.segments), *states_NHDDv.shape[1:])


class _Scratch:
    """Memory for the tensors of one segment, by name; the next segment writes over them."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._memory: dict[str, Tensor] = {}
        self._views: dict[tuple[str | int, ...], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An unwritten tensor of `shape`, in the same memory for every shape of this name."""
        view = self._views.get((name, *shape))
        if view is None:
            elements = math.prod(shape)
            if name not in self._memory or self._memory[name].numel() < elements:
                self._memory[name] = self._like.new_empty(elements)
            view = self._views[name, *shape] = self._memory[name][:elements].view(shape)
        return view


class _Piece(NamedTuple):
    """One segment of one group of heads: what every pass does with it."""

    segment: Segment
    heads: slice
    decays: Decays
    scratch: _Scratch

    def of(self, x_BTHD: Tensor) -> Tensor:
        """This piece of the rows, `[H, M * C, D]`."""
        return x_BTHD[self.segment.row, self.segment.tokens, self.heads].transpose(0, 1)

    def state(self, states_NHDDv: Tensor) -> Tensor:
        """The running state `[H, D, Dv]` that goes through this piece, to be changed in place."""
        return states_NHDDv[self.segment.run, self.heads]

    def kept(self, kept_SHDDv: Tensor) -> Tensor:
        """The state `[H, D, Dv]` of this piece among those of all segments."""
        return kept_SHDDv[self.segment.number, self.heads]

    def load(self, name: str, x_BTHD: Tensor, silu: bool) -> Tensor:
        """This piece of the rows as chunks `[Z, C, D]` in the type of the states."""
        x_HTD = self.of(x_BTHD)
        H, _, D = x_HTD.shape
        x_ZCD = self.scratch(name, H * self.segment.chunks, self.segment.size, D)
        x_ZCD.view(x_HTD.shape).copy_(x_HTD)
        return apply_silu(x_ZCD, inplace=True) if silu else x_ZCD

    def store(self, x_ZCD: Tensor, out_BTHD: Tensor) -> None:
        """The inverse of `load` without `silu`."""
        out_HTD = self.of(out_BTHD)
        out_HTD.copy_(x_ZCD.view(out_HTD.shape))

    def store_gradient(self, d_ZCD: Tensor, x_BTHD: Tensor, silu: bool, dx_BTHD: Tensor) -> None:
        """Write the gradient of what `load` made of `x_BTHD`."""
        if not silu:
            return self.store(d_ZCD, dx_BTHD)
        x_HTD, dx_HTD = self.of(x_BTHD), self.of(dx_BTHD)
        torch.ops.aten.silu_backward.grad_input(d_ZCD.view(x_HTD.shape), x_HTD, grad_input=dx_HTD)

    def enter(self, k_ZCD: Tensor, v_ZCDv: Tensor, state_HDDv: Tensor) -> tuple[Tensor, Tensor]:
        """The decayed keys, and the state `[Z, D, Dv]` that enters each chunk.

        `state_HDDv` enters the segment, and becomes the state that leaves it.
        """
        k_decayed = self.scratch("decayed k", *k_ZCD.shape)
        torch.mul(k_ZCD, self.decays.keys_ZC1, out=k_decayed)
        added_ZDDv = self._added(k_decayed, v_ZCDv)
        entering_ZDDv = self.scratch("entering", *added_ZDDv.shape)
        self._carry(state_HDDv, added_ZDDv, entering_ZDDv, self.decays.carry_HMM, 0, -1)
        return k_decayed, entering_ZDDv

    def leave(self, q_ZCD: Tensor, do_ZCDv: Tensor, d_state_HDDv: Tensor) -> tuple[Tensor, Tensor]:
        """The decayed output gradients, and the gradient `[Z, D, Dv]` of what leaves each chunk.

        `d_state_HDDv`, of the state that leaves the segment, becomes that of the one that enters.
        """
        do_decayed = self.scratch("decayed do", *do_ZCDv.shape)
        torch.mul(do_ZCDv, self.decays.queries_ZC1, out=do_decayed)
        added_ZDDv = self._added(q_ZCD, do_decayed)
        leaving_ZDDv = self.scratch("leaving", *added_ZDDv.shape)
        self._carry(d_state_HDDv, added_ZDDv, leaving_ZDDv, self.decays.carry_HMM.mT, -1, 0)
        return do_decayed, leaving_ZDDv

    def scores(self, a_ZCD: Tensor, b_ZCD: Tensor) -> Tensor:
        """The decayed products `[Z, C, C]` of each token of `a` with those of `b` up to its own."""
        Z, C, _ = a_ZCD.shape
        scores_ZCC = torch.bmm(a_ZCD, b_ZCD.mT, out=self.scratch("added", Z, C, C))
        return scores_ZCC.mul_(self.decays.scores_ZCC)

    def _added(self, a_ZCD: Tensor, b_ZCDv: Tensor) -> Tensor:
        """What each chunk adds to the state, `[Z, D, Dv]`: sum over its tokens of a b^T."""
        Z, _, D = a_ZCD.shape
        return torch.bmm(a_ZCD.mT, b_ZCDv, out=self.scratch("added", Z, D, b_ZCDv.shape[2]))

    def _carry(
        self,
        state_HDDv: Tensor,
        added_ZDDv: Tensor,
        out_ZDDv: Tensor,
        carry_HMM: Tensor,
        first: int,
        last: int,
    ) -> None:
        """Hand on from chunk `first` to `last` what enters with `state_HDDv` and what chunks add.

        Afterwards `out_ZDDv` is what each chunk was handed, `state_HDDv` what the last one hands
        on, and `added_ZDDv` is used up.
        """
        H, M, _ = carry_HMM.shape
        added, out = (x.view(H, M, -1) for x in (added_ZDDv, out_ZDDv))
        state, cross_HM1 = state_HDDv.view(H, -1), self.decays.cross_HM1
        added[:, first].addcmul_(cross_HM1[:, first], state)
        torch.bmm(carry_HMM, added, out=out)
        added[:, last].addcmul_(cross_HM1[:, last], out[:, last])
        out[:, first] = state
        state.copy_(added[:, last])


def _pieces(cut: Cut, decay_H: Tensor, like: Tensor, reverse: bool = False) -> Iterator[_Piece]:
    """All pieces, those of a group of heads in the order of the tokens or the reverse of it."""
    scratch = _Scratch(like)
    for heads in cut.heads:
        tables: dict[tuple[int, int], Decays] = {}
        for segment in reversed(cut.segments) if reverse else cut.segments:
            shape = segment.chunks, segment.size
            if shape not in tables:
                tables[shape] = Decays.of(decay_H[heads], *shape, like.dtype)
            yield _Piece(segment, heads, tables[shape].within(segment.documents), scratch)
