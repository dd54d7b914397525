"""Packed attention in linear memory: PyTorch's flash kernel on a CPU, blocks elsewhere.

Neighbouring segments of equal lengths are computed together, so a row of equal documents is one
call.

Shapes: T queries and S keys in the row, H query heads, K key/value heads, D head width; a run has N
segments of L queries and M keys.
"""

import torch
from torch import Tensor

import kernels.attention.blockwise as blockwise
import kernels.attention.cpu_flash as cpu_flash
from kernels.attention.segments import Run, Segments


def forward(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    segments: Segments,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`attention_forward`. Arguments are checked by the caller."""
    kernel = cpu_flash if q_THD.device.type == "cpu" else blockwise
    T, H, _ = q_THD.shape
    runs = segments.runs()
    if _is_all(runs, T, k_SKD.shape[0]):
        q, k, v = _queries(q_THD, runs[0]), _keys(k_SKD, runs[0]), _keys(v_SKD, runs[0])
        out, lse = kernel.forward(q, k, v, scale, segments.causal, out_dtype)
        return _row(out, out_dtype), lse.transpose(0, 1).flatten(1)
    out_THD = torch.zeros(q_THD.shape, dtype=out_dtype, device=q_THD.device)
    lse_dtype = torch.promote_types(q_THD.dtype, torch.float32)
    lse_HT = torch.full((H, T), -torch.inf, dtype=lse_dtype, device=q_THD.device)
    for run in runs:
        q, k, v = _queries(q_THD, run), _keys(k_SKD, run), _keys(v_SKD, run)
        out, lse = kernel.forward(q, k, v, scale, segments.causal, out_dtype)
        _queries(out_THD, run).copy_(out)
        _rows(lse_HT, run).copy_(lse)
    return out_THD, lse_HT


def backward(
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
    """`attention_backward`. Arguments are checked by the caller."""
    kernel = cpu_flash if q_THD.device.type == "cpu" else blockwise

    def of_run(run: Run) -> tuple[Tensor, Tensor, Tensor]:
        return kernel.backward(
            _queries(d_out_THD, run),
            _queries(q_THD, run),
            _keys(k_SKD, run),
            _keys(v_SKD, run),
            _queries(out_THD, run),
            _rows(lse_HT, run),
            None if d_lse_HT is None else _rows(d_lse_HT, run),
            scale,
            segments.causal,
            grad_dtype,
        )

    runs = segments.runs()
    if _is_all(runs, q_THD.shape[0], k_SKD.shape[0]):
        dq, dk, dv = of_run(runs[0])
        return _row(dq, grad_dtype), _row(dk, grad_dtype), _row(dv, grad_dtype)
    dq_THD, dk_SKD, dv_SKD = (
        torch.zeros(x.shape, dtype=grad_dtype, device=x.device) for x in (q_THD, k_SKD, v_SKD)
    )
    for run in runs:
        dq, dk, dv = of_run(run)
        _queries(dq_THD, run).copy_(dq)
        _keys(dk_SKD, run).copy_(dk)
        _keys(dv_SKD, run).copy_(dv)
    return dq_THD, dk_SKD, dv_SKD


def _is_all(runs: list[Run], queries: int, keys: int) -> bool:
    """Whether one run is all of the row: what the kernel returns is the result, without a copy."""
    return len(runs) == 1 and runs[0][:2] == (slice(0, queries), slice(0, keys))


def _row(x_NHLD: Tensor, dtype: torch.dtype) -> Tensor:
    """`[T, H, D]` of the run that is all of the row."""
    return x_NHLD.transpose(1, 2).flatten(0, 1).to(dtype)


def _queries(x_THD: Tensor, run: Run) -> Tensor:
    """The `[N, H, L, D]` view of a run in a row of queries."""
    return x_THD[run.queries].unflatten(0, (-1, run.queries_each)).transpose(1, 2)


def _keys(x_SKD: Tensor, run: Run) -> Tensor:
    """The `[N, K, M, D]` view of a run in a row of keys or values."""
    return x_SKD[run.keys].unflatten(0, (-1, run.keys_each)).transpose(1, 2)


def _rows(lse_HT: Tensor, run: Run) -> Tensor:
    """The `[N, H, L]` view of a run in `[H, T]`."""
    return lse_HT[:, run.queries].unflatten(1, (-1, run.queries_each)).transpose(0, 1)
