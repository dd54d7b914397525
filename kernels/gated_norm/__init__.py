"""RMSNorm over the whole channel width, times a sigmoid gate.

Shapes: x, gate and y are `[..., W]`, W the channels held here: all of them, or a share.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.gated_norm import portable, reference
from kernels.gated_norm.autograd import GatedRMSNorm, SumOfSquares

BACKENDS = ("auto", "fused", "portable", "reference")


def sum_of_squares(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Sum of x^2 over the last dimension: `[..., W]` to `[..., 1]`, differentiable in x.

    The part of the mean square that a rank can know alone: reduce it over the ranks that share the
    channels and divide by the whole width. Summed and returned in float32 (float64 for float64 x).
    Raises ValueError for a scalar or an integer x, or a backend that does not fit.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [..., W], got {x.dtype} of {list(x.shape)}")
    chosen = _choose_backend(backend, x)
    return reference.sum_of_squares(x) if chosen is reference else SumOfSquares.apply(x, chosen)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    mean_square: Tensor | None = None,
    *,
    eps: float,
    backend: str = "auto",
) -> Tensor:
    """`y = x * rsqrt(mean_square + eps) * weight * sigmoid(gate)`.

    RMSNorm (arXiv 1910.07467, equation 4) followed by the output gate of MiniMax-01's lightning
    attention. `mean_square` is an argument because its mean may run over channels of other ranks.

    Args:
        x: `[..., W]`, any floating dtype, any strides.
        gate: `[..., W]` before the sigmoid, any floating dtype, any strides.
        weight: `[W]`, any floating dtype.
        mean_square: `[..., 1]` float32 (float64 for float64 x). Where not given, all channels are
            here: it is that of x, found in the same pass.
        eps: added to the mean square, > 0.
        backend: "reference" is the formula, "portable" is PyTorch, "fused" is Triton (up to 16384
            channels, no float64), "auto" is "fused" on a CUDA device where it can, else "portable".

    Returns:
        `[..., W]` in x's dtype, computed in float32 (float64 for float64 x). Gradients reach every
        tensor argument.

    Raises:
        ValueError: a shape, dtype, device, eps or backend that does not fit.
    """
    _check_inputs(x, gate, weight, mean_square)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    chosen = _choose_backend(backend, x, gate, weight)
    if chosen is reference:
        return reference.gated_rms_norm(x, gate, weight, mean_square, eps)
    return GatedRMSNorm.apply(x, gate, weight, mean_square, eps, chosen)


def _choose_backend(name: str, *tensors: Tensor) -> Any:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "reference":
        return reference
    if name == "portable" or (name == "auto" and tensors[0].device.type != "cuda"):
        return portable
    try:
        import kernels.gated_norm.fused as fused
        from kernels.triton_runtime import unsupported
    except ImportError as error:
        if name == "auto":
            return portable
        raise ValueError(f'backend "fused" needs Triton, which failed to load: {error}') from error
    W = tensors[0].shape[-1]
    reasons = [reason for x in tensors if (reason := unsupported(x))]
    if W > fused.WIDEST:
        reasons.append(f"it takes at most {fused.WIDEST} channels, got {W}")
    if not reasons:
        return fused
    if name == "auto":
        return portable
    raise ValueError(f'backend "fused" does not fit: {reasons[0]}')


def _check_inputs(x: Tensor, gate: Tensor, weight: Tensor, mean_square: Tensor | None) -> None:
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
    devices = {y.device: None for y in (x, gate, weight, mean_square) if y is not None}
    if len(devices) > 1:
        raise ValueError(
            "x, gate, weight and mean_square must be on one device, got "
            f"{', '.join(map(str, devices))}"
        )
    if mean_square is None:
        return
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mean_square.shape != (*x.shape[:-1], 1) or mean_square.dtype != dtype:
        raise ValueError(
            f"mean_square must be {dtype} of shape {[*x.shape[:-1], 1]}, got {mean_square.dtype} "
            f"of shape {list(mean_square.shape)}"
        )
