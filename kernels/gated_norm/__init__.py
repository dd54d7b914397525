"""RMSNorm over the whole channel width, times a sigmoid gate.

Shapes: x, gate and y are `[..., W]`, W the channels held here: all of them, or a share.
"""

import torch
from torch import Tensor

from kernels.gated_norm.portable import gated_rms_norm_portable, sum_of_squares_portable
from kernels.gated_norm.reference import gated_rms_norm_reference, sum_of_squares_reference

_SUM_OF_SQUARES = {"portable": sum_of_squares_portable, "reference": sum_of_squares_reference}
_GATED_RMS_NORM = {"portable": gated_rms_norm_portable, "reference": gated_rms_norm_reference}


def sum_of_squares(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Sum of x^2 over the last dimension: `[..., W]` to `[..., 1]`, differentiable in x.

    The part of the mean square that a rank can know alone: reduce it over the ranks that share the
    channels and divide by the whole width. Summed and returned in float32 (float64 for float64 x).
    Raises ValueError for a scalar or an integer x, or an unknown backend.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [..., W], got {x.dtype} of {list(x.shape)}")
    return _SUM_OF_SQUARES[_backend_name(backend)](x)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    mean_square: Tensor,
    *,
    eps: float,
    backend: str = "auto",
) -> Tensor:
    """`y = x * rsqrt(mean_square + eps) * weight * sigmoid(gate)`.

    RMSNorm (arXiv 1910.07467, equation 4) followed by the output gate of MiniMax-01's lightning
    attention. `mean_square` is an argument because its mean may run over channels of other ranks;
    with all channels here it is `sum_of_squares(x) / W`.

    Args:
        x: `[..., W]`, any floating dtype.
        gate: `[..., W]` before the sigmoid, any floating dtype.
        weight: `[W]`, any floating dtype.
        mean_square: `[..., 1]` float32 (float64 for float64 x).
        eps: added to the mean square, > 0.
        backend: "reference", "portable", or "auto" for the fastest that runs here.

    Returns:
        `[..., W]` in x's dtype, computed in float32 (float64 for float64 x). Gradients reach every
        tensor argument.

    Raises:
        ValueError: a shape, dtype, eps or backend that does not fit.
    """
    name = _backend_name(backend)
    _check_inputs(x, gate, weight, mean_square)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    return _GATED_RMS_NORM[name](x, gate, weight, mean_square, eps)


def _backend_name(backend: str) -> str:
    name = "portable" if backend == "auto" else backend
    if name not in _GATED_RMS_NORM:
        known = ", ".join(_GATED_RMS_NORM)
        raise ValueError(f"backend must be one of auto, {known}, got {backend!r}")
    return name


def _check_inputs(x: Tensor, gate: Tensor, weight: Tensor, mean_square: Tensor) -> None:
    for name, tensor in (("x", x), ("gate", gate), ("weight", weight)):
        if tensor.dim() == 0 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be floating point [..., W], got {tensor.dtype} of "
                f"{list(tensor.shape)}"
            )
    if gate.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            "x and gate must be [..., W] and weight [W], got "
            f"{list(x.shape)}, {list(gate.shape)} and {list(weight.shape)}"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mean_square.shape != (*x.shape[:-1], 1) or mean_square.dtype != dtype:
        raise ValueError(
            f"mean_square must be {dtype} of shape {[*x.shape[:-1], 1]}, got {mean_square.dtype} "
            f"of shape {list(mean_square.shape)}"
        )
