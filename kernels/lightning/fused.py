"""Lightning attention in Triton: one kernel, used four times.

With weights w_ij = exp(-s (i - j)), output and gradients have one form, a decayed sweep:

    o_i  = sum_{j <= i} w_ij (q_i . k_j) v_j      sweep(q, k, v)   forwards,  state S   = sum k v^T
    dq_i = sum_{j <= i} w_ij (do_i . v_j) k_j     sweep(do, v, k)  forwards,  state S^T
    dk_j = sum_{i >= j} w_ij (v_j . do_i) q_i     sweep(v, do, q)  backwards, state R^T
    dv_j = sum_{i >= j} w_ij (k_j . q_i) do_i     sweep(k, q, do)  backwards, state R   = sum q do^T

So no accumulator is ever transposed: a sweep reads its state with exchanged strides. It walks the
chunks of a piece of a document with the state in registers. A row with too few heads to fill the
card is cut into pieces: one pass sums the state that each piece adds, `scan` turns these into the
states that enter the pieces, and the sweeps then run side by side. The forward keeps the entering
states (float32) for dq. No atomics, and every sum has one order: equal inputs give equal bits.

Borders of documents are read by the kernels where they lie. With pieces of L tokens, piece p of a
packed row holds the tokens of document n in [g L, (g + 1) L) for p = g + n: along the row g or n
rises at each cut, so p names a piece once and grows with the row, and a binary search finds n, the
last document with cu_seqlens[n] // L + n <= p. Some p are empty. Nothing is planned on the host, so
nothing waits for the device and no plan goes stale.

Shapes: B batch, T tokens, H heads, D key width, Dv value width, N documents, P pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

import kernels.lightning.sweep as sweep
from kernels.triton_runtime import INTERPRETED, compute_dtype

SHORTEST_PIECE = 512
"""Below it the states written and read for each piece cost more than the card's idle part."""


@dataclass(frozen=True)
class Config:
    """How a sweep is launched: tokens in a chunk, value channels in a program, warps, stages.

    Results depend on `chunk` by rounding alone, and on nothing else.
    """

    chunk: int
    value_tile: int
    warps: int
    stages: int


def config_for(width: int, value_width: int, dtype: torch.dtype, silu: bool) -> Config:
    """The launch for one shape: a table, not a search at run time, so that bits repeat.

    Sized for Hopper by what `tools/compile_kernels.py` counts: the state `[width, value_tile]`
    takes 64 registers of each of 128 threads, and two stages of the three tiles leave room for two
    programs on a multiprocessor. A SiLU on the way needs twice the threads, or registers spill.
    """
    width, value_width = (max(triton.next_power_of_2(x), 16) for x in (width, value_width))
    if dtype == torch.float32:
        return Config(64, min(value_width, max(4096 // width, 16)), 8, 1)
    return Config(64, min(value_width, max(8192 // width, 16)), 8 if silu else 4, 2)


def forward(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHDv: Tensor,
    decay_H: Tensor,
    cu_seqlens: Tensor | None,
    initial_state_NHDDv: Tensor | None,
    return_final_state: bool,
    silu: bool,
    keep_states: bool,
    config: Config | None = None,
    piece: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `kernels.lightning.autograd.Backend`; `piece`, for tests, is the length of a piece."""
    row = _Row.of(q_BTHD, v_BTHDv, decay_H, cu_seqlens, config, piece)
    key_value = _Sum(k_BTHD, v_BTHDv, silu, silu)
    entering, final = _entering_states(row, key_value, initial_state_NHDDv, return_final_state)
    o_BTHDv = torch.empty(v_BTHDv.shape, dtype=v_BTHDv.dtype, device=v_BTHDv.device)
    _sweep_row(row, q_BTHD, silu, key_value, o_BTHDv, state=entering, leaving=final)
    return o_BTHDv, final, entering if keep_states and row.is_cut else None


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
    config: Config | None = None,
    piece: int | None = None,
) -> Tensor | None:
    """See `kernels.lightning.autograd.Backend`. Without `states` they are computed anew."""
    if d_o is None:
        d_o = torch.zeros_like(v)
    row = _Row.of(q, v, decay, cu_seqlens, config, piece)
    if states is None:
        states, _ = _entering_states(row, _Sum(k, v, silu, silu), initial_state, False)
    d_entering, d_initial = _entering_states(
        row, _Sum(q, d_o, silu, False), d_final_state, need_initial, reverse=True
    )
    before = q if silu else None, k if silu else None, v if silu else None
    _sweep_row(row, d_o, False, _Sum(v, k, silu, silu), dq, before[0], states, transposed=True)
    reverse: dict[str, Any] = {"state": d_entering, "reverse": True}
    _sweep_row(row, v, silu, _Sum(d_o, q, False, silu), dk, before[1], transposed=True, **reverse)
    _sweep_row(row, k, silu, _Sum(q, d_o, silu, False), dv, before[2], leaving=d_initial, **reverse)
    return d_initial


def state(k: Tensor, v: Tensor, decay: Tensor, cu_seqlens: Tensor | None, silu: bool) -> Tensor:
    """See `kernels.lightning.autograd.Backend`."""
    row = _Row.of(k, v, decay, cu_seqlens, None, None)
    return _leaving_state(row, _Sum(k, v, silu, silu), reverse=False)


def state_gradient(
    q: Tensor, d_o: Tensor, decay: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """See `kernels.lightning.autograd.Backend`."""
    row = _Row.of(q, d_o, decay, cu_seqlens, None, None)
    return _leaving_state(row, _Sum(q, d_o, silu, False), reverse=True)


def decode(
    q_SHD: Tensor,
    k_SHD: Tensor,
    v_SHDv: Tensor,
    decay_H: Tensor,
    states_PHDDv: Tensor,
    slots_S: Tensor,
    silu: bool,
) -> Tensor:
    """See `kernels.lightning.decode.lightning_decode`."""
    S, H, D = q_SHD.shape
    Dv = v_SHDv.shape[-1]
    o_SHDv = torch.empty(v_SHDv.shape, dtype=v_SHDv.dtype, device=v_SHDv.device)
    width_tile = triton.next_power_of_2(D)
    value_tile = min(triton.next_power_of_2(Dv), max(4096 // width_tile, 1))
    grid = (triton.cdiv(Dv, value_tile) * H * S,)
    if grid[0]:
        with torch.cuda.device_of(states_PHDDv):
            sweep.decode[grid](
                q_SHD,
                k_SHD,
                v_SHDv,
                o_SHDv,
                decay_H.contiguous(),
                states_PHDDv,
                slots_S.contiguous(),
                H,
                *q_SHD.stride(),
                *k_SHD.stride(),
                *v_SHDv.stride(),
                WIDTH=D,
                VALUE_WIDTH=Dv,
                WIDTH_TILE=width_tile,
                VALUE_TILE=value_tile,
                SILU=silu,
                num_warps=4,
            )
    return o_SHDv


class _Sum(NamedTuple):
    """A state is a decayed sum of outer products of keys and values; which of them pass a SiLU."""

    keys: Tensor
    values: Tensor
    silu_keys: bool
    silu_values: bool


@dataclass(frozen=True)
class _Row:
    """What all launches of one call share."""

    decay_H: Tensor
    cu_seqlens: Tensor | None
    batch: int
    tokens: int
    documents: int
    width: int
    value_width: int
    piece: int
    dtype: torch.dtype
    config: Config | None

    @classmethod
    def of(
        cls,
        q_BTHD: Tensor,
        v_BTHDv: Tensor,
        decay_H: Tensor,
        cu_seqlens: Tensor | None,
        config: Config | None,
        piece: int | None,
    ) -> _Row:
        B, T, H, D = q_BTHD.shape
        Dv = v_BTHDv.shape[-1]
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(q_BTHD.device, non_blocking=True).contiguous()
        if piece is None:
            tile = (config or config_for(D, Dv, q_BTHD.dtype, False)).value_tile
            piece = _piece_length(T, B * H * triton.cdiv(Dv, tile), q_BTHD.device)
        return cls(
            decay_H.contiguous(),
            cu_seqlens,
            B,
            T,
            B if cu_seqlens is None else cu_seqlens.numel() - 1,
            D,
            Dv,
            piece,
            q_BTHD.dtype,
            config,
        )

    @property
    def is_cut(self) -> bool:
        """Whether a document may have several pieces. One that is not cut is piece n."""
        return self.piece <= self.tokens

    @property
    def pieces_per_row(self) -> int:
        """Of a row that is not packed."""
        return max(triton.cdiv(self.tokens, self.piece), 1)

    @property
    def pieces(self) -> int:
        """Upper bound of the pieces, from numbers that the host knows."""
        if self.cu_seqlens is None:
            return self.batch * self.pieces_per_row
        return self.tokens // self.piece + self.documents

    def borders(self) -> tuple[Any, ...]:
        """What the kernels need to find a piece."""
        return self.cu_seqlens, self.tokens, self.documents, self.pieces_per_row, self.piece

    def empty_states(self, count: int) -> Tensor:
        shape = (count, self.decay_H.shape[0], self.width, self.value_width)
        return torch.empty(shape, dtype=torch.float32, device=self.decay_H.device)


def _piece_length(tokens: int, programs: int, device: torch.device) -> int:
    """The longest power of two that gives every multiprocessor two programs; whole documents, by a
    piece longer than the row, where heads alone do."""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(2 * processors, max(programs, 1))
    # Pieces cost a second read of keys and values: worth more than a tenth of the card.
    if 10 * programs >= 9 * processors or tokens < 2 * SHORTEST_PIECE:
        return triton.next_power_of_2(tokens + 1)
    return max(triton.next_power_of_2(triton.cdiv(tokens, wanted) + 1) // 2, SHORTEST_PIECE)


def _entering_states(
    row: _Row, outer: _Sum, boundary: Tensor | None, return_leaving: bool, reverse: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """The states that enter the pieces from `boundary`, and room for (with cut documents: already
    there) those that leave the documents."""
    boundary = _dense(boundary)
    leaving = row.empty_states(row.documents) if return_leaving else None
    if not row.is_cut:
        return boundary, leaving
    entering = row.empty_states(row.pieces)
    _sweep_row(row, None, False, outer, None, leaving=entering, reverse=reverse)
    _scan_row(row, entering, boundary, leaving, reverse)
    return entering, leaving


def _leaving_state(row: _Row, outer: _Sum, reverse: bool) -> Tensor:
    if row.is_cut:
        leaving = _entering_states(row, outer, None, True, reverse)[1]
        assert leaving is not None
        return leaving
    leaving = row.empty_states(row.documents)
    _sweep_row(row, None, False, outer, None, leaving=leaving, reverse=reverse)
    return leaving


def _sweep_row(
    row: _Row,
    queries: Tensor | None,
    silu_queries: bool,
    outer: _Sum,
    out: Tensor | None,
    before_silu: Tensor | None = None,
    state: Tensor | None = None,
    leaving: Tensor | None = None,
    reverse: bool = False,
    transposed: bool = False,
) -> None:
    """Launch `sweep` over all pieces. Without `out` it only sums states into `leaving`; with cut
    documents `leaving` is the business of `scan`, so only a sweep without `out` fills it."""
    if out is not None and row.is_cut:
        leaving = None
    keys, values, silu_keys, silu_values = outer
    width, value_width = keys.shape[-1], values.shape[-1]
    silu = silu_queries or silu_keys or silu_values
    config = row.config or config_for(width, value_width, row.dtype, silu)
    tiles = triton.cdiv(value_width, config.value_tile)
    grid = (tiles * row.decay_H.shape[0] * row.pieces,)
    if grid[0] == 0:
        return
    with torch.cuda.device_of(row.decay_H):
        sweep.sweep[grid](
            queries,
            keys,
            values,
            out,
            before_silu,
            state,
            leaving,
            row.decay_H,
            *row.borders(),
            row.decay_H.shape[0],
            *_strides(queries),
            *_strides(keys),
            *_strides(values),
            *_strides(out),
            *_strides(before_silu),
            *((1, width) if transposed else (value_width, 1)),
            WIDTH=width,
            VALUE_WIDTH=value_width,
            WIDTH_TILE=max(triton.next_power_of_2(width), 16),
            VALUE_TILE=max(config.value_tile, 16),
            CHUNK=config.chunk,
            REVERSE=reverse,
            SILU_QUERIES=silu_queries,
            SILU_KEYS=silu_keys,
            SILU_VALUES=silu_values,
            COMPUTE=compute_dtype(row.dtype),
            PRECISION="ieee" if INTERPRETED else "tf32x3",
            num_warps=config.warps,
            num_stages=config.stages,
        )


def _scan_row(
    row: _Row, states: Tensor, boundary: Tensor | None, leaving: Tensor | None, reverse: bool
) -> None:
    numbers = row.width * row.value_width
    block = 1024
    grid = (triton.cdiv(numbers, block) * row.decay_H.shape[0] * row.documents,)
    if grid[0] == 0:
        return
    with torch.cuda.device_of(row.decay_H):
        sweep.scan[grid](
            states,
            boundary,
            leaving,
            row.decay_H,
            *row.borders(),
            row.decay_H.shape[0],
            numbers,
            BLOCK=block,
            REVERSE=reverse,
            num_warps=4,
        )


def _dense(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()
