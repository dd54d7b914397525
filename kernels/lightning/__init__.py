"""Lightning attention: linear attention with one constant decay per head.

Shapes: B batch, T tokens, H heads, D key width, Dv value width, N documents in a packed row.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

import kernels.lightning.portable as portable
import kernels.lightning.reference as reference
from kernels.lightning import autograd
from kernels.lightning.autograd import views
from kernels.packed import document_bounds

BACKENDS = ("auto", "fused", "portable", "reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    silu: bool = False,
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
    silu: bool = False,
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
    silu: bool = False,
    backend: str = "auto",
) -> Any:
    """`S_t = exp(-decay) S_{t-1} + k_t v_t^T`, `o_t = q_t^T S_t`, with no scale and no normaliser.

    The lightning attention of MiniMax-01 (arXiv 2501.08313, section 2.2); the current token enters
    its own output with weight one.

    Args:
        q, k: `[B, T, H, D]`, float16, bfloat16, float32 or float64, any strides, read in place.
        v: `[B, T, H, Dv]` of the same dtype.
        decay: `[H]` float32, the finite slopes s_h >= 0. A constant, without a gradient. Values on
            a device are not checked, as that would wait for it.
        cu_seqlens: `[N+1]` int32 borders of the documents of a packed row, from 0 to T; B must then
            be 1. No state crosses a border. On the host or on q's device, from which "fused" reads
            it where it lies, without waiting and unchecked (outputs of tokens that no document has
            are then undefined), and "portable" copies it to the host.
        initial_state: `[N, H, D, Dv]` float32 state before each document (N = B without
            `cu_seqlens`); zero where not given.
        return_final_state: also return the state after each document.
        silu: apply SiLU to q, k and v first, inside the kernel.
        backend: "reference" is the token recurrence, "portable" is chunked PyTorch, "fused" is
            Triton, "auto" the fastest that runs here.

    Returns:
        `o` `[B, T, H, Dv]` in v's dtype, or `(o, final_state)` with `final_state` `[N, H, D, Dv]`.
        States are float32 (float64 for float64 inputs). Gradients reach q, k, v and
        `initial_state`, also through `final_state`.

    Raises:
        ValueError: a shape, dtype, device, slope, border or backend that does not fit.
    """
    _check_qkv(q, k, v, decay)
    return _attend((q, k, v), decay, cu_seqlens, initial_state, return_final_state, silu, backend)


def lightning_attention_qkv(
    qkv: Tensor,
    decay: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    silu: bool = False,
    backend: str = "auto",
) -> Any:
    """`lightning_attention` of a fused projection, whose gradient is written as one tensor too.

    Args:
        qkv: `[B, T, H, 3 D]`, of each head q, k and v side by side, any strides.

    The other arguments, the result and the errors are those of `lightning_attention`.
    """
    if qkv.dim() != 4 or qkv.shape[3] % 3:
        raise ValueError(f"qkv must be [B, T, H, 3 D], got {list(qkv.shape)}")
    _check_qkv(*views((qkv,)), decay)
    return _attend((qkv,), decay, cu_seqlens, initial_state, return_final_state, silu, backend)


def lightning_forward(
    qkv: Sequence[Tensor],
    decay: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    silu: bool = False,
    keep_states: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`lightning_attention` without autograd: `o`, and states to be kept for `lightning_backward`.

    Args:
        qkv: q, k and v as in `lightning_attention`, or one tensor as in `lightning_attention_qkv`.
        keep_states: whether a backward is to follow. What is kept is the backend's own, and None
            where it has nothing to keep.

    Other arguments and errors are those of `lightning_attention`, but for the backend "reference",
    which autograd alone can differentiate.
    """
    q, k, v = views(qkv)
    chosen = _checked_backend(backend, q, k, v, decay, cu_seqlens, initial_state)
    o, _, states = chosen.forward(
        q, k, v, decay, cu_seqlens, initial_state, False, silu, keep_states
    )
    return o, states


def lightning_backward(
    d_o: Tensor,
    qkv: Sequence[Tensor],
    d_qkv: Sequence[Tensor],
    decay: Tensor,
    states: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    d_final_state: Tensor | None = None,
    silu: bool = False,
    backend: str = "auto",
) -> None:
    """Write the gradients of q, k and v into `d_qkv`, without autograd.

    Args:
        d_o: `[B, T, H, Dv]`, any strides.
        d_qkv: tensors of the shapes of `qkv`, any strides, so that stretches of one row can be
            written side by side.
        states: what `lightning_forward` kept.
        d_final_state: `[N, H, D, Dv]` gradient of the state after each document; zero if not given.

    Other arguments are those that `lightning_forward` was given.
    """
    q, k, v = views(qkv)
    chosen = _checked_backend(backend, q, k, v, decay, cu_seqlens, initial_state)
    chosen.backward(
        d_o,
        d_final_state,
        q,
        k,
        v,
        decay,
        cu_seqlens,
        initial_state,
        states,
        silu,
        *views(d_qkv),
        need_initial=False,
    )


def lightning_state(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    silu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The state `[N, H, D, Dv]` after each document, from zero: sum_j exp(-s (L-1-j)) k_j v_j^T.

    What a context-parallel rank tells those after it; no gradient is recorded. Arguments and errors
    are those of `lightning_attention`; L is the length of a document.
    """
    _check_qkv(k, k, v, decay)
    _documents(k, cu_seqlens)
    return choose_backend(backend, k).state(k, v, decay, cu_seqlens, silu)


def lightning_state_gradient(
    q: Tensor,
    d_o: Tensor,
    decay: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    silu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """What the outputs of each document add to the gradient of the state before it.

    `[N, H, D, Dv]`, sum_i exp(-s (i+1)) q_i do_i^T, for `d_o` `[B, T, H, Dv]`: what a
    context-parallel rank tells those before it. `silu` applies to q. Other arguments and errors
    are those of `lightning_attention`.
    """
    _check_qkv(q, q, d_o, decay)
    _documents(q, cu_seqlens)
    return choose_backend(backend, q).state_gradient(q, d_o, decay, cu_seqlens, silu)


def _attend(
    qkv: tuple[Tensor, ...],
    decay: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    silu: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor | None]:
    q, _, v = views(qkv)
    chosen = choose_backend(backend, q)
    documents = _documents(q, cu_seqlens)
    if initial_state is not None:
        _check_state(initial_state, q, v, documents)
    if chosen is reference:
        o, final_state = reference.lightning_attention_reference(
            *views(qkv), decay, cu_seqlens, initial_state, silu
        )
    else:
        options = autograd.Options(chosen, return_final_state, silu, torch.is_grad_enabled())
        o, final_state = autograd.apply(qkv, decay, cu_seqlens, initial_state, options)
    return (o, final_state) if return_final_state else o


def _checked_backend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> Any:
    """The backend of a call without autograd, after the checks of its arguments."""
    _check_qkv(q, k, v, decay)
    documents = _documents(q, cu_seqlens)
    if initial_state is not None:
        _check_state(initial_state, q, v, documents)
    chosen = choose_backend(name, q)
    if chosen is reference:
        raise ValueError('backend "reference" has no backward of its own: use lightning_attention')
    return chosen


def choose_backend(name: str, q: Tensor) -> Any:
    """The module that computes `q`: "portable" where "auto" finds no way to do better.

    Raises ValueError for a name that is not known, or a backend that cannot compute `q`.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "reference":
        return reference
    if name == "portable" or (name == "auto" and q.device.type != "cuda"):
        return portable
    try:
        import kernels.lightning.fused as fused
        from kernels.triton_runtime import unsupported
    except ImportError as error:
        if name == "auto":
            return portable
        raise ValueError(f'backend "fused" needs Triton, which failed to load: {error}') from error
    reason = unsupported(q)
    if reason is None:
        return fused
    if name == "auto":
        return portable
    raise ValueError(f'backend "fused" does not fit: {reason}')


def _documents(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """N, after the checks that wait for no device."""
    if cu_seqlens is None:
        return q.shape[0]
    if q.shape[0] != 1:
        raise ValueError(f"a packed row has batch size 1, got q of shape {list(q.shape)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens must be int32 of shape [N+1] with N >= 1, got {cu_seqlens.dtype} of shape "
            f"{list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type == "cpu":
        document_bounds(cu_seqlens, q.shape[1])
    elif cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens must be on the host or with q on {q.device}, got {cu_seqlens.device}"
        )
    return cu_seqlens.numel() - 1


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "q and k must be [B, T, H, D] and v [B, T, H, Dv], got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if 0 in q.shape[2:] or v.shape[3] == 0:
        raise ValueError(
            f"q, k and v must have a head and a channel at least, got {list(q.shape)} and "
            f"{list(v.shape)}"
        )
    check_decay(decay, q.shape[2])
    if not q.device == k.device == v.device == decay.device:
        raise ValueError(
            "q, k, v and decay must be on one device, got "
            f"{q.device}, {k.device}, {v.device} and {decay.device}"
        )


def check_decay(decay: Tensor, heads: int) -> None:
    """Raises ValueError unless `decay` is a constant slope per head. Waits for no device."""
    if list(decay.shape) != [heads] or decay.dtype != torch.float32:
        raise ValueError(
            f"decay must be float32 of shape [{heads}], one slope per head, got {decay.dtype} "
            f"of shape {list(decay.shape)}"
        )
    if decay.requires_grad:
        raise ValueError("decay must not require a gradient, which it would not get")
    if decay.device.type == "cpu":
        least, most = (x.item() for x in decay.aminmax())
        if not 0 <= least <= most < math.inf:
            raise ValueError(f"decay must be finite slopes s >= 0, got {least} to {most}")


def _check_state(state: Tensor, q: Tensor, v: Tensor, documents: int) -> None:
    shape = [documents, q.shape[2], q.shape[3], v.shape[3]]
    dtype = torch.promote_types(q.dtype, torch.float32)
    if list(state.shape) != shape or state.dtype != dtype or state.device != q.device:
        raise ValueError(
            f"initial_state must be {dtype} of shape {shape} on {q.device}, got {state.dtype} of "
            f"shape {list(state.shape)} on {state.device}"
        )
