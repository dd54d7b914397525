"""Packed attention by a FlashAttention library on a GPU: what it wants to be given, and gets wrong.

A segment without queries or without keys never reaches a library. FlashAttention-2 takes every
segment to have a query where the longest has one and heads are grouped, the backward of
FlashAttention-3 was reported to hang, and all call the log-sum-exp of no keys +inf. Nothing here
waits for the device.

Shapes: T queries and S keys in the row, H query heads, K key/value heads, D head width.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.attention.flash_libraries import Library, Packed
from kernels.attention.segments import Segments

CHANNELS = 8
"""Head widths are filled up to a multiple of it."""
LSE_PARTS = 3
"""Channels that the gradient of lse takes: float32 in full, as parts of half precision."""
WIDEST = 256 - LSE_PARTS


@dataclass(frozen=True)
class FlashBackend:
    """A backend of `attention_forward` and `attention_backward` made of one library.

    Results come out of the library in half precision, whatever dtype they are asked for in.
    """

    library: Library

    def unsupported(self, q_THD: Tensor) -> str | None:
        """Why the library cannot take queries such as these, in a few words; None where it can."""
        if q_THD.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes float16 and bfloat16, got {q_THD.dtype}"
        if q_THD.shape[-1] > WIDEST:
            return f"it takes heads of at most {WIDEST} channels, got {q_THD.shape[-1]}"
        return self.library.missing(q_THD.device)

    def forward(
        self,
        q_THD: Tensor,
        k_SKD: Tensor,
        v_SKD: Tensor,
        segments: Segments,
        scale: float,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        T, H, D = q_THD.shape
        rows = _Rows.of(segments)
        if rows.empty:
            lse_HT = torch.full((H, T), -torch.inf, device=q_THD.device)
            return q_THD.new_zeros(T, H, D, dtype=out_dtype), lse_HT
        q, k, v = rows.queries(q_THD), rows.keys(k_SKD), rows.keys(v_SKD)
        q, k, v = (_readable(x, q_THD.dtype) for x in (q, k, v))
        out, lse_HT = self.library.forward(q, k, v, rows.packed(q.device), scale)
        if lse_HT.shape != (H, q.shape[0]) or lse_HT.dtype != torch.float32:
            raise RuntimeError(
                f"a FlashAttention library must give a float32 log-sum-exp of shape "
                f"{[H, q.shape[0]]}, got {lse_HT.dtype} of shape {list(lse_HT.shape)}"
            )
        out_THD = rows.put_queries(out[..., :D].to(out_dtype), 0.0)
        return out_THD, rows.put_queries(lse_HT.mT, -torch.inf).mT

    def backward(
        self,
        d_out_THD: Tensor,
        q_THD: Tensor,
        k_SKD: Tensor,
        v_SKD: Tensor,
        out_THD: Tensor,
        lse_HT: Tensor,
        d_lse_HT: Tensor | None,
        segments: Segments,
        scale: float,
        grad_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = _Rows.of(segments)
        if rows.empty:
            dq, dk, dv = (torch.zeros_like(x, dtype=grad_dtype) for x in (q_THD, k_SKD, v_SKD))
            return dq, dk, dv
        dtype, D = q_THD.dtype, q_THD.shape[-1]
        if d_lse_HT is not None:
            d_out_THD, out_THD = _with_lse_gradient(d_out_THD, out_THD, d_lse_HT, dtype)
        channels = d_out_THD.shape[-1]
        d_out, q, out = (rows.queries(x) for x in (d_out_THD, q_THD, out_THD))
        k, v = rows.keys(k_SKD), rows.keys(v_SKD)
        d_out, q, k, v, out = (_readable(x, dtype, channels) for x in (d_out, q, k, v, out))
        lse = rows.queries(lse_HT.mT).mT.contiguous()
        grads = self.library.backward(d_out, q, k, v, out, lse, rows.packed(q.device), scale)
        dq, dk, dv = (x[..., :D].to(grad_dtype) for x in grads)
        return rows.put_queries(dq, 0.0), rows.put_keys(dk, 0.0), rows.put_keys(dv, 0.0)


def _with_lse_gradient(
    d_out_THD: Tensor, out_THD: Tensor, d_lse_HT: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """d_out and out with channels that bring d_lse into the kernel's delta = sum(d_out * out).

    With it, dS = P (dP - delta + d_lse): a channel with 1 in d_out, -d_lse in out and 0 in q, k and
    v adds to delta alone.
    """
    rest_TH = -d_lse_HT.mT
    parts = []
    for _ in range(LSE_PARTS):
        parts.append(rest_TH.to(dtype))
        rest_TH = rest_TH - parts[-1]
    out_THD = torch.cat((out_THD.to(dtype), torch.stack(parts, dim=-1)), dim=-1)
    return pad(d_out_THD, (0, LSE_PARTS), value=1.0), out_THD


def _readable(x_THD: Tensor, dtype: torch.dtype, width: int = 0) -> Tensor:
    """Of `dtype`, filled up to `width` and to CHANNELS, readable in vectors of 16 aligned bytes."""
    x_THD = x_THD.to(dtype)
    D = x_THD.shape[-1]
    missing = max(D, width) - D
    missing += -(D + missing) % CHANNELS
    if missing:
        return pad(x_THD, (0, missing))
    *outer, channel = x_THD.stride()
    steps_fit = channel == 1 and all(step > 0 and step % CHANNELS == 0 for step in outer)
    if steps_fit and x_THD.data_ptr() % 16 == 0:
        return x_THD
    return x_THD.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class _Rows:
    """The tokens of the segments that have both queries and keys, packed anew if need be."""

    lengths: list[tuple[int, int]]
    """Queries and keys of each of those segments."""
    spans_q: list[slice]
    spans_k: list[slice]
    tokens_q: int
    """Queries of all segments."""
    tokens_k: int
    causal: bool

    @classmethod
    def of(cls, segments: Segments) -> "_Rows":
        lengths = [both for both in segments.lengths if all(both)]
        runs = segments.runs()
        return cls(
            lengths,
            [run.queries for run in runs],
            [run.keys for run in runs],
            segments.bounds_q[-1],
            segments.bounds_k[-1],
            segments.causal,
        )

    @property
    def empty(self) -> bool:
        return not self.lengths

    def packed(self, device: torch.device) -> Packed:
        queries, keys = zip(*self.lengths, strict=True)
        borders = [[0, *accumulate(lengths)] for lengths in (queries, keys)]
        # One copy, out of pinned memory: the host goes on at once.
        host = torch.tensor(borders, dtype=torch.int32, pin_memory=device.type == "cuda")
        cu_q, cu_k = host.to(device, non_blocking=True)
        return Packed(cu_q, cu_k, max(queries), max(keys), self.causal)

    def queries(self, x: Tensor) -> Tensor:
        return _take(x, self.spans_q)

    def keys(self, x: Tensor) -> Tensor:
        return _take(x, self.spans_k)

    def put_queries(self, x: Tensor, rest: float) -> Tensor:
        return _put(x, self.spans_q, self.tokens_q, rest)

    def put_keys(self, x: Tensor, rest: float) -> Tensor:
        return _put(x, self.spans_k, self.tokens_k, rest)


def _take(x: Tensor, spans: list[slice]) -> Tensor:
    """The rows of `x` in `spans`, themselves where that is all of them."""
    if sum(span.stop - span.start for span in spans) == x.shape[0]:
        return x
    return torch.cat([x[span] for span in spans])


def _put(x: Tensor, spans: list[slice], tokens: int, rest: float) -> Tensor:
    """The inverse of `_take`, with `rest` in the other rows."""
    if x.shape[0] == tokens:
        return x
    whole = x.new_full((tokens, *x.shape[1:]), rest)
    parts = x.split([span.stop - span.start for span in spans])
    for span, part in zip(spans, parts, strict=True):
        whole[span] = part
    return whole
