"""Modules that stay in FP32 inside a model of lower precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class KeepFloat32(nn.Module):
    """Mix-in whose parameters and buffers follow moves between devices but no change of dtype.

    Megatron's ``Float16Module`` casts the whole model with ``module.bfloat16()``; the router and
    the FP32 LM head must not follow.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


def without_tf32() -> None:
    """Multiply FP32 matrices in full precision on CUDA too. MiniMax trains the FP32 LM head with
    TF32 off (answer in the MiniMax-M1 repository, issue 3)."""
    torch.set_float32_matmul_precision("highest")
