"""Softmax attention over a packed row of documents, with its log-sum-exp.

Shapes: T tokens in the row, H query heads, K key/value heads, D head width, N documents; where
queries and keys are not the same tokens, Tq and Tk of them.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.attention import portable, reference
from kernels.attention.autograd import Attention, Backend
from kernels.attention.flash import FlashBackend
from kernels.attention.flash_libraries import LIBRARIES
from kernels.attention.segments import Segments
from kernels.packed import document_bounds

_FLASH = {name: FlashBackend(library) for name, library in LIBRARIES.items()}
_BACKENDS: dict[str, Backend] = {**_FLASH, "portable": portable, "reference": reference}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`softmax(scale q k^T) v` over the earlier tokens of the same document, the own one included.

    Attention of Vaswani et al. (arXiv 1706.03762, equation 1) with grouped queries (arXiv
    2305.13245): query head h reads key/value head h // (H / K). Memory is linear in T.

    Args:
        q: `[T, H, D]`, float16, bfloat16, float32 or float64, any strides.
        k, v: `[T, K, D]` of the same dtype, H a multiple of K.
        cu_seqlens: `[N+1]` int32 borders of the documents, from 0 to T. Give it on the host: the
            plan is made there, and reading it from a device waits for that device.
        scale: factor on q k^T, `D ** -0.5` where not given.
        backend: "reference" forms whole score matrices, "portable" is PyTorch in linear memory;
            "flash_attention_3", "flash_attention_2" (packages of those names) and "torch_flash"
            (PyTorch's own) take half precision on an NVIDIA GPU; "auto" is the first of these three
            that runs here, or else "portable". Equal inputs give equal bits, but from those three
            only under `torch.use_deterministic_algorithms`.

    Returns:
        `out` `[T, H, D]` in q's dtype and `lse` `[H, T]` float32 (float64 for float64 q), the
        natural logarithm of the sum of the exponentials of the scaled scores. Gradients reach q, k
        and v through both, so that partial results can be merged by their `lse`.

    Raises:
        ValueError: a shape, dtype, device, border or backend that does not fit.
    """
    _check_inputs(q, k, v)
    chosen = _backend(backend, q)
    if k.shape[0] != q.shape[0]:
        raise ValueError(
            "q must be [T, H, D] and k and v [T, K, D] with one number of tokens, got "
            f"{q.shape[0]} and {k.shape[0]}"
        )
    bounds = document_bounds(cu_seqlens, q.shape[0])
    segments = Segments(bounds, bounds, causal=True)
    if scale is None:
        scale = q.shape[2] ** -0.5
    if chosen is reference:
        return reference.forward(q, k, v, segments, scale, q.dtype)
    return Attention.apply(q, k, v, chosen, segments, scale)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bounds_q: list[int],
    bounds_k: list[int],
    causal: bool,
    scale: float,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The queries of each segment against its keys: one part of an attention, without autograd.

    Parts of the keys give partial results, to be merged in float32 by their log-sum-exp:
    `lse = logaddexp(lse_a, lse_b)`, `out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b`.

    Args:
        q: `[Tq, H, D]`, float16, bfloat16, float32 or float64, any strides.
        k, v: `[Tk, K, D]` of the same dtype, H a multiple of K.
        bounds_q, bounds_k: the N+1 borders of the segments, from 0 to Tq and from 0 to Tk: segment
            n of the queries sees segment n of the keys. Either may be empty.
        causal: a query sees the keys up to its own place in the segment, which must then have as
            many keys as queries; otherwise it sees all of them.
        scale: factor on q k^T.
        out_dtype: dtype of `out`, q's where not given. Pass float32 where parts are to be merged:
            "portable" and "reference" then never round them, a FlashAttention library does once.
        backend: as in `varlen_attention`.

    Returns:
        `out` `[Tq, H, D]` and `lse` `[H, Tq]` float32 (float64 for float64 q). A query without keys
        gets 0 and -inf.

    Raises:
        ValueError: a shape, dtype, device, border or backend that does not fit.
    """
    _check_inputs(q, k, v)
    segments = _segments(q, k, bounds_q, bounds_k, causal)
    with torch.no_grad():
        return _backend(backend, q).forward(q, k, v, segments, scale, out_dtype or q.dtype)


def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    bounds_q: list[int],
    bounds_k: list[int],
    causal: bool,
    scale: float,
    d_lse: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What one part of an attention adds to the gradients of its q, k and v, without autograd.

    FlashAttention's backward (arXiv 2307.08691, algorithm 2): P = exp(scale q k^T - lse), dV = P^T
    dO, dS = P (dO V^T - delta + d_lse), delta = the sum of `d_out * out` over D. With `out` and
    `lse` of the whole attention, over all its parts, the gradients of the parts add up to those of
    the whole.

    Args:
        d_out: `[Tq, H, D]`, any floating dtype, any strides.
        q, k, v, bounds_q, bounds_k, causal, scale, backend: as in `attention_forward`.
        out: `[Tq, H, D]`, any floating dtype.
        lse: `[H, Tq]` float32 (float64 for float64 q), of all the keys that a query sees.
        d_lse: the gradient of `lse`, of its shape and dtype; zero where not given.
        grad_dtype: dtype of the results, q's where not given. Pass float32 where parts are to be
            summed, with the effect that `out_dtype` has in `attention_forward`.

    Returns:
        `dq` `[Tq, H, D]`, `dk` and `dv` `[Tk, K, D]`, zero for queries without keys and keys
        without queries.

    Raises:
        ValueError: a shape, dtype, device, border or backend that does not fit.
    """
    _check_inputs(q, k, v)
    segments = _segments(q, k, bounds_q, bounds_k, causal)
    wide = torch.promote_types(q.dtype, torch.float32)
    _check_like(q, d_out=(d_out, q.shape, None), out=(out, q.shape, None))
    _check_like(q, lse=(lse, (q.shape[1], q.shape[0]), wide))
    if d_lse is not None:
        _check_like(q, d_lse=(d_lse, lse.shape, wide))
    with torch.no_grad():
        return _backend(backend, q).backward(
            d_out, q, k, v, out, lse, d_lse, segments, scale, grad_dtype or q.dtype
        )


def _backend(name: str, q: Tensor) -> Backend:
    if name == "auto":
        usable = (flash for flash in _FLASH.values() if flash.unsupported(q) is None)
        return next(usable, portable)
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(_BACKENDS)}, got {name!r}")
    reason = _FLASH[name].unsupported(q) if name in _FLASH else None
    if reason:
        raise ValueError(f"backend {name} cannot run: {reason}")
    return _BACKENDS[name]


def _segments(
    q: Tensor, k: Tensor, bounds_q: list[int], bounds_k: list[int], causal: bool
) -> Segments:
    segments = Segments(bounds_q, bounds_k, causal)
    if (bounds_q[-1], bounds_k[-1]) != (q.shape[0], k.shape[0]):
        raise ValueError(
            f"bounds_q must end at the {q.shape[0]} queries and bounds_k at the {k.shape[0]} keys, "
            f"got {bounds_q[-1]} and {bounds_k[-1]}"
        )
    return segments


def _check_like(q: Tensor, **expected: Any) -> None:
    """Each argument is (tensor, its shape, its dtype or None for any floating one)."""
    for name, (tensor, shape, dtype) in expected.items():
        fits = tensor.dtype == dtype if dtype else tensor.is_floating_point()
        if tensor.shape != shape or not fits or tensor.device != q.device:
            raise ValueError(
                f"{name} must be {dtype or 'floating point'} of shape {list(shape)} on {q.device}, "
                f"got {tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
            )


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3 or v.shape != k.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            "q must be [T, H, D] and k and v [T, K, D], got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the query heads must be a multiple of the key/value heads, got {q.shape[1]} and "
            f"{k.shape[1]}"
        )
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}"
        )
