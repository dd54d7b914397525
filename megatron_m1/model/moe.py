"""The mixture of experts: Megatron's layer with our router, experts and overlapped exchange."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
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
from megatron_m1.model.linear import LinearProvider
from megatron_m1.model.router import Float32Router
from megatron_m1.model.routing import Routing
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
    return TESpecProvider() if HAVE_TE else LinearProvider()


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
        routing: Routing | None = None,
    ) -> tuple[Tensor, None]:
        """[T, 1, C] -> ([T, 1, C], no bias), where sequence parallelism leaves a rank T / tp.

        Args:
            padding_mask: T bools of the whole row, true for padding.
            routing: of the whole row.
        """
        padding, routing = self.own_part(padding_mask), self.own_routing(routing)
        if not self.scatters:
            return self._forward(hidden_states, padding, routing), None
        local = scatter_to_sequence_parallel_region(hidden_states, group=self.attn_tp_group)
        output = self._forward(local, padding, routing)
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

    def own_routing(self, routing: Routing | None) -> Routing | None:
        """Of the tokens that this tensor-parallel rank routes."""
        group = self.attn_tp_group
        return routing and routing.part(group.rank(), group.size())

    def _forward(
        self, hidden_T1C: Tensor, padding_1T: Tensor | None, routing: Routing | None
    ) -> Tensor:
        if self._is_alone and not self.training and not torch.is_grad_enabled():
            return self._alone(hidden_T1C, routing)
        compute = self._exchanged if self.config.moe_overlap_groups == 1 else self._overlapped
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(
                partial(compute, padding_1T=padding_1T, routing=routing), False, hidden_T1C
            )
        return compute(hidden_T1C, padding_1T, routing)

    @property
    def _is_alone(self) -> bool:
        """Whether this rank has all experts, in weights that it can compute with."""
        groups = self.expert_groups.both, self.attn_tp_group
        return (
            all(group.size() == 1 for group in groups)
            and isinstance(self.experts, Experts)
            and self.experts.usable_without_calls
        )

    def _alone(self, hidden_T1C: Tensor, routing: Routing | None) -> Tensor:
        """No exchange and no graph: generation reads a few tokens at a time, for which Megatron's
        dispatch would cost more than the experts."""
        x_TC = hidden_T1C.flatten(end_dim=1)
        probs_TK, experts_TK = self.router.assignments(x_TC, routing)
        experts_A, order = experts_TK.flatten().sort(stable=True)
        tokens_A = order // experts_TK.shape[1]
        counts = experts_A.bincount(minlength=self.config.num_moe_experts).tolist()
        # FP32, as in training: rounding them would be most of what rollout and trainer differ by.
        probs_A = probs_TK.flatten().index_select(0, order)
        answers = self.experts.answers(x_TC.index_select(0, tokens_A), probs_A, counts)
        return torch.zeros_like(x_TC).index_add_(0, tokens_A, answers).view_as(hidden_T1C)

    def _exchanged(
        self, hidden_T1C: Tensor, padding_1T: Tensor | None, routing: Routing | None
    ) -> Tensor:
        """Megatron's dispatch, all tokens at once."""
        probs_TE, routing_TE = self.router(hidden_T1C, padding_1T, routing)
        rows, probs = self.preprocess(hidden_T1C, probs_TE, routing_TE)
        rows, probs = self.dispatch(rows, probs)
        output, _ = self.routed_experts_compute(rows, probs)
        return self.postprocess(self.combine(output), None)

    def preprocess(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Megatron's: the rows to be sent and their probabilities."""
        rows = super().preprocess(hidden_states, probs, routing_map)
        # The dispatcher of the all-to-all keeps the probabilities for their dtype, and with them
        # the graph: through the gradient hooks in C++ that holds the model, where no garbage
        # collector sees it.
        self.token_dispatcher.probs = probs.detach()
        return rows

    def _overlapped(
        self, hidden_T1C: Tensor, padding_1T: Tensor | None, routing: Routing | None
    ) -> Tensor:
        probs_TE, routing_TE = self.router(hidden_T1C, padding_1T, routing)

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
