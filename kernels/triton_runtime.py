"""Where Triton kernels run: on a CUDA device, or on a CPU under Triton's interpreter.

The interpreter (`TRITON_INTERPRET=1`, read when a kernel is defined) is for tests. Its bfloat16
arithmetic is wrong, so kernels convert what they load to `compute_dtype` before anything else.
"""

import os

import torch
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_NATIVE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """The type in which matrix products take their operands, for tensors of `dtype`."""
    return tl.float32 if INTERPRETED else _NATIVE[dtype]


def unsupported(x: Tensor) -> str | None:
    """Why no Triton kernel can read `x`, in a few words; None where one can."""
    if x.dtype not in _NATIVE:
        return f"it takes float16, bfloat16 and float32, got {x.dtype}"
    if INTERPRETED and x.device.type != "cpu":
        return f"TRITON_INTERPRET=1 runs on the CPU, got a tensor on {x.device}"
    if not INTERPRETED and x.device.type != "cuda":
        return f"it needs a CUDA device or TRITON_INTERPRET=1, got a tensor on {x.device}"
    return None
