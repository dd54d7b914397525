"""The mixture of experts: Megatron's layer with an FP32 router that counts what it sends."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_m1.model.experts import Experts
from megatron_m1.model.float32 import KeepFloat32
from parallel.host import has_accelerator

try:
    import transformer_engine  # noqa: F401
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    HAVE_TE = has_accelerator()
except ImportError:
    HAVE_TE = False


def spec_provider() -> Any:
    """Megatron's linear and grouped layers: Transformer Engine's where installed, else its own."""
    return TESpecProvider() if HAVE_TE else LocalSpecProvider()


class Float32Router(KeepFloat32, TopKRouter):
    """Top-k router with FP32 weights (as MiniMax stores them), logits and probabilities.

    Attributes:
        routed: [E] float32, tokens sent to each expert since the last ``take_counts``.
        offered: assignments before any token was dropped, since then.
        sums_weight_gradient: sum the weight's gradient over the tensor-parallel group, each rank of
            which routes other tokens. Megatron does it where sequence parallelism is on.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        config = copy.copy(config)
        config.params_dtype = torch.float32
        super().__init__(config, pg_collection=pg_collection)
        self.capacity_factor = config.moe_expert_capacity_factor
        self.routed: Tensor | None = None
        self.offered = 0
        self.sums_weight_gradient = False

    def gating(self, input: Tensor) -> Tensor:
        weight = self.weight
        if self.sums_weight_gradient:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        return F.linear(input.float(), weight)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Capacity is a means of training; elsewhere no token misses an expert for its neighbours.
        self.config.moe_expert_capacity_factor = self.capacity_factor if self.training else None
        probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        if self.training and torch.is_grad_enabled():
            # With recomputation the first forward runs without gradients: count once.
            sent = routing_map.sum(dim=0, dtype=torch.float32)
            self.routed = sent if self.routed is None else self.routed + sent
            self.offered += routing_map.shape[0] * self.topk
        return probs, routing_map

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        reduce_group_has_dp: bool = False,
        valid_token_count: int | Tensor | None = None,
    ) -> Tensor:
        """Megatron weighs each rank's share of the loss with that rank's tokens; the shares add up
        to the loss of all tokens of the group, so each must count for all of them. Without this the
        balancing gradient shrinks as tensor parallelism grows (Megatron-LM issues 1652, 3672)."""
        tokens = activation.shape[0] if valid_token_count is None else valid_token_count
        return super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff,
            aux_loss,
            aux_loss_name,
            reduce_group,
            reduce_group_has_dp,
            valid_token_count=tokens * reduce_group.size(),
        )

    def take_counts(self) -> tuple[Tensor, int]:
        """(``routed``, ``offered``), both then start again from zero."""
        routed, offered = self.routed, self.offered
        self.routed, self.offered = None, 0
        if routed is None:
            routed = torch.zeros(self.num_experts, device=self.weight.device)
        return routed, offered


class MoE(MoELayer):
    """Megatron's MoE layer, which needs each tensor-parallel rank to bring its own tokens. Sequence
    parallelism does that; without it the tokens are scattered here and gathered again."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        experts, expert_linears = spec_provider().grouped_mlp_modules(
            config.moe_grouped_gemm, moe_use_legacy_grouped_gemm=False
        )
        experts = experts if HAVE_TE else Experts
        scatters = config.tensor_model_parallel_size > 1 and not config.sequence_parallel
        if scatters:
            config = copy.copy(config)
            config.sequence_parallel = True
        super().__init__(
            config,
            MoESubmodules(
                experts=ModuleSpec(module=experts, submodules=expert_linears), router=Float32Router
            ),
            pg_collection=pg_collection or get_default_pg_collection(),
        )
        self.scatters = scatters
        self.router.sums_weight_gradient = scatters

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """[T, 1, C] -> ([T, 1, C], no bias)."""
        if not self.scatters:
            return super().forward(hidden_states, padding_mask=padding_mask)
        local = scatter_to_sequence_parallel_region(hidden_states, group=self.attn_tp_group)
        output, _ = super().forward(local, padding_mask=padding_mask)
        return (
            gather_from_sequence_parallel_region(
                output, tensor_parallel_output_grad=False, group=self.attn_tp_group
            ),
            None,
        )
