"""One layer in MiniMax's DeepNorm wiring.

    u = norm1(x);  y = alpha u + beta attention(u);  w = norm2(y);  out = alpha w + beta moe(w)

The residual is the *normed* input, which makes this a post-norm network with one more norm on the
embedding (MiniMax-01, arXiv 2501.08313, section 2.3; ``postnorm`` in MiniMax-M1's modeling code).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_m1.model.row_params import RowParams


class ScaledResidual:
    """alpha * residual + beta * branch, in the shape that Megatron builds and calls a
    bias-dropout-add."""

    def __init__(self, alpha: float, beta: float) -> None:
        self.alpha = alpha
        self.beta = beta

    def __call__(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        return self.add

    def add(self, branch_and_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
        branch, _ = branch_and_bias
        if self.beta != 1.0:
            branch = branch * self.beta
        return torch.add(branch, residual, alpha=self.alpha)


class DeepNormLayer(TransformerLayer):
    """A Megatron layer that takes its residuals from norms with ``returns_residual``.

    Megatron-core 0.16.1 takes the residual before the norm and has no hook for another; its main
    branch has, and makes these two methods superfluous. ``overlap_moe_expert_parallel_comm`` calls
    around ``_forward_mlp``; ``schedule_plan`` has its counterpart.
    """

    def init_backward_dw_wrapper(self) -> None:
        """Weight gradients that wait for their turn (``delay_wgrad_compute``) are not used."""
        self.backward_dw_wrapper = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: RowParams | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Megatron's, with what the row asks of the router. Megatron's own argument for padding
        does not reach later pipeline stages in the right shape."""
        hidden, _ = self._forward_attention(hidden_states, attention_mask, packed_seq_params)
        return self._forward_mlp(hidden, packed_seq_params), None

    def _forward_attention(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: RowParams | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        normed, residual = self.input_layernorm(hidden_states)
        branch = self.self_attention(
            normed, attention_mask=attention_mask, packed_seq_params=packed_seq_params
        )
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        return add(branch, residual, self.hidden_dropout), None

    def _forward_mlp(self, hidden_states: Tensor, row: RowParams | None = None) -> Tensor:
        normed, residual = self.pre_mlp_layernorm(hidden_states)
        asked = {"padding_mask": row.padding, "routing": row.routing} if row else {}
        branch = self.mlp(normed, **asked)
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        return add(branch, residual, self.hidden_dropout)
