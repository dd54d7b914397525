"""The LM head in FP32: weights, product and gradient.

MiniMax-M1 (arXiv 2506.13585, section 3.2) found trainer and rollout probabilities to disagree
through the head's precision.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from megatron_m1.model.float32 import KeepFloat32


class Float32LMHead(KeepFloat32, ColumnParallelLinear):
    """A vocabulary-parallel head that multiplies in FP32 whatever the model's precision."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.params_dtype = torch.float32
        super().__init__(input_size, output_size, config=config, **kwargs)

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        """[T, 1, C] in any precision -> ([T, 1, V / tp] float32, no bias)."""
        return super().forward(input_.float(), weight, runtime_gather_output)
