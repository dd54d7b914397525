"""A micro-batch in the pieces that Megatron's ``overlap_moe_expert_parallel_comm`` interleaves.

That schedule runs the forward pass of one micro-batch beside the backward pass of another, layer by
layer, so that the tokens of one travel to their experts while the other computes. For that it takes
the layers apart. It knows layers whose residual is not normed and heads that make logits: the
pieces that differ here are ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.models.common.model_chunk_schedule_plan import (
    TransformerLayerSchedulePlan,
    TransformerModelChunkSchedulePlan,
)
from megatron.core.models.gpt.fine_grained_callables import PostProcessNode
from megatron.core.pipeline_parallel.utils import get_comp_stream
from torch import Tensor

from megatron_m1.model.build import MiniMaxM1
from megatron_m1.model.row_params import RowParams
from parallel.packing import PackedRow


class SchedulePlan(TransformerModelChunkSchedulePlan):
    """The pieces of one row's way through a model chunk, which ends in the sum of its losses."""

    def __init__(self, chunk: MiniMaxM1, row: PackedRow) -> None:
        super().__init__(
            chunk,
            input_ids=row.tokens[None],
            position_ids=None,
            attention_mask=None,
            labels=row.labels,
            loss_mask=row.loss_mask,
            packed_seq_params=RowParams.of(row),
        )
        if chunk.post_process:
            self.post_process = _Head(chunk, self.state, self.event, get_comp_stream())

    def _build_layer_schedule_plan(self, module: Any, *streams: Any) -> None:
        layers = [] if module is None else module.layers
        for index, layer in enumerate(layers):
            ends = {"is_first_layer": index == 0, "is_last_layer": index == len(layers) - 1}
            self._transformer_layers.append(
                _LayerPlan(layer, self.event, self.state, *streams, extra_args=ends)
            )


class _LayerPlan(TransformerLayerSchedulePlan):
    def _build_callable_nodes(self, *args: Any) -> None:
        super()._build_callable_nodes(*args)
        self.attn.submodule = partial(_attention_and_routing, self.layer)


def _attention_and_routing(layer: Any, node: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """A layer up to the exchange. The experts' residual is the normed input."""
    chunk = node.chunk_state
    hidden_states, _ = layer._forward_attention(
        hidden_states, packed_seq_params=chunk.packed_seq_params
    )
    normed, residual = layer.pre_mlp_layernorm(hidden_states)
    row = chunk.packed_seq_params
    padding, routing = layer.mlp.own_part(row.padding), layer.mlp.own_routing(row.routing)
    probs, routing_map = layer.mlp.router(normed, padding, routing)
    rows, probs = layer.mlp.preprocess(normed, probs, routing_map)
    node.layer_state.residual = node.detach(residual)
    return rows, probs


class _Head(PostProcessNode):
    def forward_impl(self, hidden_states: Tensor) -> Tensor:
        total, _ = self.gpt_model.output_layer(
            hidden_states,
            labels=self.chunk_state.labels,
            loss_mask=self.chunk_state.loss_mask,
            with_entropy=False,
        )
        return total
