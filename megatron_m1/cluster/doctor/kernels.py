"""Lightning attention of this device against the recurrence that defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.lightning import lightning_attention
from megatron_m1.cluster.doctor.finding import OK, PROBLEM, Finding
from parallel import host

# B, T, H, D: a length that no chunk divides.
_SHAPE = (1, 300, 2, 64)
_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2}


def examine() -> Finding:
    """Outputs and gradients of the path that a run takes here, at a small size."""
    device = host.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = "lightning attention"
    what = f"{str(dtype).removeprefix('torch.')} on {device.type}"
    try:
        error = _largest_error(device, dtype)
    except Exception as failure:
        words = (str(failure).splitlines() or [""])[0]
        found = f"{what} ends with {type(failure).__name__}: {words}"
        return Finding(name, PROBLEM, found, "compare Triton and torch with pyproject.toml")
    found = f"{what}: {error:.1e} from the reference"
    if not error < _TOLERANCE[dtype]:
        advice = "do not train here: exclude the node; pytest tests/kernels shows more"
        return Finding(name, PROBLEM, found, advice)
    return Finding(name, OK, f"{what} equals the reference")


def _largest_error(device: torch.device, dtype: torch.dtype) -> float:
    """Over outputs and all gradients, relative to the largest value of each."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(_SHAPE, generator=generator).to(dtype).to(device) for _ in range(4)]
    decay = torch.tensor([0.01, 0.5], device=device)
    here = _outputs(inputs, decay, "auto")
    truth = _outputs([each.double() for each in inputs], decay, "reference")
    return max(
        float((mine.double() - true).abs().max() / true.abs().max())
        for mine, true in zip(here, truth, strict=True)
    )


def _outputs(inputs: list[Tensor], decay: Tensor, backend: str) -> list[Tensor]:
    *qkv, gradient = inputs
    q, k, v = leaves = [each.detach().requires_grad_() for each in qkv]
    output = lightning_attention(q, k, v, decay, backend=backend)
    output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
