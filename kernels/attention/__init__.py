"""Causal softmax attention over a packed row of documents, with its log-sum-exp.

Shapes: T tokens in the row, H query heads, K key/value heads, D head width, N documents.
"""

import torch
from torch import Tensor

from kernels.attention.portable import varlen_attention_portable
from kernels.attention.reference import varlen_attention_reference
from kernels.packed import document_bounds

_BACKENDS = {"portable": varlen_attention_portable, "reference": varlen_attention_reference}
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
        cu_seqlens: `[N+1]` int32 borders of the documents, from 0 to T.
        scale: factor on q k^T, `D ** -0.5` where not given.
        backend: "reference" forms whole score matrices, "portable" does not, "auto" is the fastest
            that runs here.

    Returns:
        `out` `[T, H, D]` in q's dtype and `lse` `[H, T]` float32 (float64 for float64 q), the
        natural logarithm of the sum of the exponentials of the scaled scores. Gradients reach q, k
        and v through both, so that partial results can be merged by their `lse`.

    Raises:
        ValueError: a shape, dtype, device, border or backend that does not fit.
    """
    name = "portable" if backend == "auto" else backend
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(_BACKENDS)}, got {backend!r}")
    _check_inputs(q, k, v)
    bounds = document_bounds(cu_seqlens, q.shape[0])
    if scale is None:
        scale = q.shape[2] ** -0.5
    return _BACKENDS[name](q, k, v, bounds, scale)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    if (
        q.dim() != 3
        or k.dim() != 3
        or v.shape != k.shape
        or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2])
    ):
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
