"""RMSNorm with the residual of DeepNorm's wiring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the model's width.

    With ``returns_residual`` the call gives ``(normed, residual)``, the protocol that Megatron's
    main branch asks norms for; MiniMax takes the residual *after* the norm, so both are the same
    tensor. Sequence parallelism leaves each rank a share of the tokens, so the weight is marked for
    Megatron to sum its gradient over the tensor-parallel group.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        returns_residual: bool = False,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.returns_residual = returns_residual
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        normed = F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        return (normed, normed) if self.returns_residual else normed
