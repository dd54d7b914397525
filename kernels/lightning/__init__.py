"""Lightning attention: linear attention with one constant decay per head.

Shapes: B batch, T tokens, H heads, D key width, Dv value width, N documents in a packed row.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from kernels.lightning.portable import lightning_attention_portable
from kernels.lightning.reference import lightning_attention_reference
from kernels.packed import document_bounds

_BACKENDS = {
    "portable": lightning_attention_portable,
    "reference": lightning_attention_reference,
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor | None]:
    """`S_t = exp(-decay) S_{t-1} + k_t v_t^T`, `o_t = q_t^T S_t`, with no scale and no normaliser.

    The lightning attention of MiniMax-01 (arXiv 2501.08313, section 2.2); the current token enters
    its own output with weight one.

    Args:
        q, k: `[B, T, H, D]`, float16, bfloat16, float32 or float64, any strides.
        v: `[B, T, H, Dv]` of the same dtype.
        decay: `[H]` float32, the slopes s_h >= 0. A constant: no gradient flows to it. Negative
            slopes are the caller's mistake and are not looked for, as that would wait for a device.
        cu_seqlens: `[N+1]` int32 borders of the documents of a packed row; B must then be 1. No
            state crosses a border.
        initial_state: `[N, H, D, Dv]` float32 state before each document (N = B without
            `cu_seqlens`); zero where not given.
        return_final_state: also return the state after each document.
        backend: "reference" is the token recurrence, "portable" is chunked PyTorch, "auto" the
            fastest that runs here.

    Returns:
        `o` `[B, T, H, Dv]` in v's dtype, or `(o, final_state)` with `final_state` `[N, H, D, Dv]`.
        States are float32 (float64 for float64 inputs). Gradients reach q, k, v and
        `initial_state`, also through `final_state`.

    Raises:
        ValueError: a shape, dtype, device, border or backend that does not fit.
    """
    name = "portable" if backend == "auto" else backend
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(_BACKENDS)}, got {backend!r}")
    _check_inputs(q, k, v, decay)
    bounds = None
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(f"a packed row has batch size 1, got q of shape {list(q.shape)}")
        bounds = document_bounds(cu_seqlens, q.shape[1])
    if initial_state is not None:
        documents = q.shape[0] if bounds is None else len(bounds) - 1
        _check_state(initial_state, q, v, documents)
    o, final_state = _BACKENDS[name](q, k, v, decay, bounds, initial_state, return_final_state)
    return (o, final_state) if return_final_state else o


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "q and k must be [B, T, H, D] and v [B, T, H, Dv], got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if decay.shape != q.shape[2:3] or decay.dtype != torch.float32:
        raise ValueError(
            f"decay must be float32 of shape [{q.shape[2]}], one slope per head, got {decay.dtype} "
            f"of shape {list(decay.shape)}"
        )
    if not q.device == k.device == v.device == decay.device:
        raise ValueError(
            "q, k, v and decay must be on one device, got "
            f"{q.device}, {k.device}, {v.device} and {decay.device}"
        )


def _check_state(state: Tensor, q: Tensor, v: Tensor, documents: int) -> None:
    shape = [documents, q.shape[2], q.shape[3], v.shape[3]]
    dtype = torch.promote_types(q.dtype, torch.float32)
    if list(state.shape) != shape or state.dtype != dtype or state.device != q.device:
        raise ValueError(
            f"initial_state must be {dtype} of shape {shape} on {q.device}, got {state.dtype} of "
            f"shape {list(state.shape)} on {state.device}"
        )
