"""The mixture of experts: Megatron's layer with our router, experts and overlapped exchange."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_m1.model.experts import Experts
from megatron_m1.model.router import Float32Router
from parallel.experts import ExpertGroups, exchange_and_compute
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


class MoE(MoELayer):
    """Megatron's MoE layer, which needs each tensor-parallel rank to bring its own tokens. Sequence
    parallelism does that; without it the tokens are scattered here and gathered again.

    With ``moe_overlap_groups`` above 1 the exchange of tokens is ours (``parallel/experts.py``).
    """

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
        groups = pg_collection or get_default_pg_collection()
        super().__init__(
            config,
            MoESubmodules(
                experts=ModuleSpec(module=experts, submodules=expert_linears), router=Float32Router
            ),
            pg_collection=groups,
        )
        self.expert_groups = ExpertGroups(groups.ep, groups.expt_tp, groups.tp_ep)
        self.scatters = scatters
        self.router.sums_weight_gradient = scatters

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """[T, 1, C] -> ([T, 1, C], no bias), where sequence parallelism leaves a rank T / tp.

        Args:
            padding_mask: T bools of the whole row, true for padding.
        """
        padding = self.own_part(padding_mask)
        if not self.scatters:
            return self._forward(hidden_states, padding), None
        local = scatter_to_sequence_parallel_region(hidden_states, group=self.attn_tp_group)
        output = self._forward(local, padding)
        return (
            gather_from_sequence_parallel_region(
                output, tensor_parallel_output_grad=False, group=self.attn_tp_group
            ),
            None,
        )

    def own_part(self, padding_mask: Tensor | None) -> Tensor | None:
        """Of the tokens that this tensor-parallel rank routes, [1, T / tp]."""
        if padding_mask is None:
            return None
        group = self.attn_tp_group
        return padding_mask.view(1, -1).chunk(group.size(), dim=1)[group.rank()]

    def _forward(self, hidden_T1C: Tensor, padding_1T: Tensor | None) -> Tensor:
        if self.config.moe_overlap_groups == 1:
            output, _ = super().forward(hidden_T1C, padding_mask=padding_1T)
            return output
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(self._overlapped, False, hidden_T1C, padding_1T)
        return self._overlapped(hidden_T1C, padding_1T)

    def _overlapped(self, hidden_T1C: Tensor, padding_1T: Tensor | None) -> Tensor:
        probs_TE, routing_TE = self.route(hidden_T1C, padding_1T)

        def experts(rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Tensor:
            output, _ = self.experts(rows, tokens_per_expert, probs)
            return output

        output_TC = exchange_and_compute(
            hidden_T1C.flatten(end_dim=1),
            probs_TE,
            routing_TE,
            experts,
            self.expert_groups,
            self.config.moe_overlap_groups,
        )
        return output_TC.view_as(hidden_T1C)
