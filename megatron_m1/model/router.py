"""The router: FP32, with a capacity over the ranks that share experts, and its two losses.

    balancing = E * sum over experts of f_e P_e,  f_e = assignments to e / (T K),  P_e = mean prob
    z         = mean over tokens of logsumexp(logits)^2

of the T tokens of a micro-batch, padding left out, on all ranks that hold parts of it. Both count
with T in the sum of the tokens' losses, so that they do not depend on how the batch is divided:

    loss = (sum over tokens of CE + sum over micro-batches of T (aux * balancing + z_coef * z))
           / trained tokens

and each layer adds its own. (Switch Transformer, arXiv 2101.03961, equations 4 to 6; ST-MoE, arXiv
2202.08906, equation 5.)

Shapes: N tokens of this rank, E experts, K experts of a token.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    save_to_aux_losses_tracker,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_m1.model.float32 import KeepFloat32
from megatron_m1.model.routing import Routing
from parallel.capacity import taken


class Float32Router(KeepFloat32, TopKRouter):
    """Top-k router with FP32 weights (as MiniMax stores them), logits and probabilities.

    Attributes:
        sums_weight_gradient: sum the weight's gradient over the tensor-parallel group, each rank of
            which routes other tokens. Megatron does it where sequence parallelism is on.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        config = copy.copy(config)
        config.params_dtype = torch.float32
        super().__init__(config, pg_collection=pg_collection)
        self.capacity_group = {
            "rank": None,
            "micro_batch": self.tp_cp_group,
            "ep": pg_collection.tp_ep,
        }[config.moe_capacity_scope]
        self.sums_weight_gradient = False
        self._counts: Tensor | None = None

    def gating(self, input: Tensor) -> Tensor:
        weight = self.weight
        if self.sums_weight_gradient:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        return F.linear(input.float(), weight)

    def forward(
        self,
        input: Tensor,
        padding_mask: Tensor | None = None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[N, 1, C] -> ``routing``'s result, by these weights."""
        return self.routing(self.gating(input), padding_mask, routing)

    def assignments(self, input: Tensor, routing: Routing | None) -> tuple[Tensor, Tensor]:
        """[N, C] -> probabilities and numbers of the experts of each token, both [N, K]: what
        ``routing`` maps where nothing is dropped or learnt."""
        logits = self.gating(input)
        if routing is None:
            scores, experts = logits.topk(self.topk, dim=1)
        else:
            replay = routing.of_layer(self.layer_number - 1)
            scores, experts = replay.get_replay_topk(logits, self.topk, None, None, _largest)
        return scores.softmax(dim=1), experts

    def routing(
        self,
        logits: Tensor,
        padding_mask: Tensor | None = None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[N, 1, E] -> probabilities and routing map, both [N, E].

        Args:
            padding_mask: N bools, true for padding. It counts in no loss, load or capacity; where
                there is a capacity it is sent nowhere.
            routing: of these N tokens.
        """
        logits = logits.view(-1, self.num_experts)
        replay = routing and routing.of_layer(self.layer_number - 1)
        probs, asked = topk_routing_with_score_function(logits, self.topk, router_replay=replay)
        text = asked.new_ones(()) if padding_mask is None else ~padding_mask.reshape(-1, 1)
        pending = asked & text
        # With recomputation the first forward runs without gradients: lose and count once.
        learns = self.training and torch.is_grad_enabled()
        if learns:
            probs = self._with_losses(probs, logits, pending, text)
        # Capacity is a means of training; elsewhere no token misses an expert for its neighbours.
        if self.training and self.config.moe_expert_capacity_factor is not None:
            asked = taken(
                probs,
                pending,
                self.topk,
                self.config.moe_expert_capacity_factor,
                self.config.moe_token_drop_policy,
                self.capacity_group,
            )
            probs = probs * asked
        if learns:
            self._count(asked & pending, pending)
        return probs, asked

    def _with_losses(self, probs: Tensor, logits: Tensor, pending: Tensor, text: Tensor) -> Tensor:
        """``probs``, whose backward pass also runs that of this rank's share of the losses."""
        aux, z = self.config.moe_aux_loss_coeff, self.config.moe_z_loss_coeff
        if not (aux or z):
            return probs
        assignments = pending.sum(dim=0)
        dist.all_reduce(assignments, group=self.tp_cp_group)
        assigned = assignments.sum().clamp(min=1)
        tokens = assigned / self.topk
        total = logits.new_zeros(())
        if aux:
            prob_sums = (logits.softmax(dim=-1) * text).sum(dim=0)
            balancing = self.num_experts * (assignments / assigned * prob_sums).sum()
            self._record("load_balancing_loss", balancing / tokens)
            total = total + aux * balancing
        if z:
            squares = (logits.logsumexp(dim=-1, keepdim=True).square() * text).sum()
            self._record("z_loss", squares / tokens)
            total = total + z * squares
        return MoEAuxLossAutoScaler.apply(probs, total)

    def _record(self, name: str, share: Tensor) -> None:
        """A share of a loss, which Megatron's metrics sum over the ranks of the micro-batch."""
        save_to_aux_losses_tracker(
            name,
            share,
            self.layer_number,
            self.config.num_layers,
            reduce_group=self.tp_cp_group,
        )

    def _count(self, sent: Tensor, offered: Tensor) -> None:
        counts = torch.stack([sent.sum(dim=0), offered.sum(dim=0)]).float()
        self._counts = counts if self._counts is None else self._counts + counts

    def take_counts(self) -> Tensor:
        """[2, E] float32: tokens sent to each expert since the last call, and those that asked for
        it before any was dropped; both then start again from zero."""
        counts, self._counts = self._counts, None
        if counts is None:
            counts = torch.zeros(2, self.num_experts, device=self.weight.device)
        return counts


def _largest(
    scores: Tensor, topk: int, num_groups: None = None, group_topk: None = None
) -> tuple[Tensor, Tensor]:
    return scores.topk(topk, dim=1)
