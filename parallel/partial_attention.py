"""Attention of queries to keys that come in parts, merged by their log-sum-exp.

    lse = log(exp(lse_a) + exp(lse_b)),  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

A part of the keys that a set of queries sees in full is a rectangle of the score matrix.

Shapes: T queries, S keys, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import attention_backward, attention_forward


class Rectangle(NamedTuple):
    """A slice of the queries, each of which sees all of a slice of the keys."""

    queries: slice
    keys: slice

    @property
    def bounds_q(self) -> list[int]:
        return [0, self.queries.stop - self.queries.start]

    @property
    def bounds_k(self) -> list[int]:
        return [0, self.keys.stop - self.keys.start]


class Options(NamedTuple):
    """How scores are scaled and by which backend of `kernels.attention` they are computed."""

    scale: float
    backend: str


def attend_segments(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, bounds: list[int], options: Options
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each segment: `out` [T, H, D] and `lse` [H, T], both to be merged
    into, so float32 (float64 for float64 q)."""
    return attention_forward(
        q_THD,
        k_TKD,
        v_TKD,
        bounds_q=bounds,
        bounds_k=bounds,
        causal=True,
        out_dtype=torch.promote_types(q_THD.dtype, torch.float32),
        **options._asdict(),
    )


def attend_rectangles(
    out_THD: Tensor,
    lse_HT: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    rectangles: Sequence[Rectangle],
    options: Options,
) -> None:
    """Merge what the queries see of further keys into `out` and `lse`, in place."""
    for rectangle in rectangles:
        queries, keys = rectangle
        part_THD, part_lse_HT = attention_forward(
            q_THD[queries],
            k_SKD[keys],
            v_SKD[keys],
            bounds_q=rectangle.bounds_q,
            bounds_k=rectangle.bounds_k,
            causal=False,
            out_dtype=out_THD.dtype,
            **options._asdict(),
        )
        before_HT = lse_HT[:, queries]
        total_HT = torch.logaddexp(before_HT, part_lse_HT)
        out_THD[queries] *= _weight(before_HT, total_HT)
        out_THD[queries] += part_THD.mul_(_weight(part_lse_HT, total_HT))
        lse_HT[:, queries] = total_HT


def _weight(part_lse_HT: Tensor, total_HT: Tensor) -> Tensor:
    return (part_lse_HT - total_HT).exp_().T[..., None]


class PartialGradients:
    """The gradients of an attention, summed over its parts.

    Attributes:
        dq_THD: float32 (float64 for float64 q), of the parts asked for so far.
    """

    dq_THD: Tensor

    def __init__(
        self, d_out_THD: Tensor, q_THD: Tensor, out_THD: Tensor, lse_HT: Tensor, options: Options
    ) -> None:
        """`out` and `lse` are those of the whole attention, which makes the parts add up."""
        self._d_out, self._q, self._out, self._lse = d_out_THD, q_THD, out_THD, lse_HT
        self._options = options

    def of_segments(self, k_TKD: Tensor, v_TKD: Tensor, bounds: list[int]) -> tuple[Tensor, Tensor]:
        """dk and dv [T, K, D] of the causal part, to be added to. The first part asked for."""
        self.dq_THD, dk, dv = attention_backward(
            self._d_out,
            self._q,
            k_TKD,
            v_TKD,
            self._out,
            self._lse,
            bounds_q=bounds,
            bounds_k=bounds,
            causal=True,
            grad_dtype=self._lse.dtype,
            **self._options._asdict(),
        )
        return dk, dv

    def add_rectangles(
        self,
        k_SKD: Tensor,
        v_SKD: Tensor,
        rectangles: Sequence[Rectangle],
        dk_SKD: Tensor,
        dv_SKD: Tensor,
    ) -> None:
        """Add the part of further keys to their gradients, in place, and to `dq_THD`."""
        for rectangle in rectangles:
            queries, keys = rectangle
            dq, dk, dv = attention_backward(
                self._d_out[queries],
                self._q[queries],
                k_SKD[keys],
                v_SKD[keys],
                self._out[queries],
                self._lse[:, queries],
                bounds_q=rectangle.bounds_q,
                bounds_k=rectangle.bounds_k,
                causal=False,
                grad_dtype=self._lse.dtype,
                **self._options._asdict(),
            )
            self.dq_THD[queries] += dq
            dk_SKD[keys] += dk
            dv_SKD[keys] += dv
