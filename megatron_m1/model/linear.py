"""Megatron's linear layers, which in generation are the product alone.

Megatron's forward asks a dozen questions about communication and keeps what the backward needs. For
the few tokens of a step of decoding, on a rank that has all columns, that costs more than the
product.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from kernels.few_rows import few_rows_linear


def _is_product_alone(linear: Any) -> bool:
    return (
        not (linear.training or torch.is_grad_enabled())
        and linear.tp_group.size() == 1
        and linear.bias is None
    )


class ColumnLinear(ColumnParallelLinear):
    """[T, 1, C] -> ([T, 1, out / tp], no bias)."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if _is_product_alone(self):
            return few_rows_linear(input_, self.weight), None
        return super().forward(input_, *args, **kwargs)


class RowLinear(RowParallelLinear):
    """[T, 1, in / tp] -> ([T, 1, C], no bias)."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if _is_product_alone(self):
            return few_rows_linear(input_, self.weight), None
        return super().forward(input_, *args, **kwargs)


class LinearProvider(LocalSpecProvider):
    """Megatron's own layers with these among them."""

    def column_parallel_linear(self) -> type:
        return ColumnLinear

    def row_parallel_linear(self) -> type:
        return RowLinear
