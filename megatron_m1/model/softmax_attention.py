"""The softmax attention block: grouped queries, rotation of the first dimensions of each head.

Shapes: T tokens of the packed row, C width of the model, H query heads and K key/value heads on
this rank, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from kernels.attention import varlen_attention
from megatron_m1.model.cache import Cache, KeysValues
from megatron_m1.model.row_params import RowParams
from parallel.varlen_ring import ring_attention


def rotate(heads_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first dimensions of each head, the rest passing through.

    The pairs are (i, i + rotary_dim / 2), GPT-NeoX's halves inside the rotated dimensions.

    Args:
        heads_THD: [T, H, D].
        cos, sin: [T, rotary_dim / 2] float32.
    """
    half = cos.shape[-1]
    first, second, rest = heads_THD.split([half, half, heads_THD.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([part.to(heads_THD.dtype) for part in rotated] + [rest], dim=-1)


class VarlenCoreAttention(MegatronModule):
    """Causal attention inside each document of a packed row, as Megatron's core attention: on this
    rank where it has the whole row, over the context-parallel group where it has a part."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: RowParams,
        **unused: Any,
    ) -> Tensor:
        """query [T, H, D], key and value [T, K, D] -> [T, H*D]."""
        shard, cached = packed_seq_params.shard, packed_seq_params.cached
        if cached is not None:
            return cached.attend(self.layer_number, query, key, value)
        if shard is None:
            mixed, _ = varlen_attention(query, key, value, packed_seq_params.cu_seqlens_host)
        else:
            mixed = ring_attention(query, key, value, shard.ring, self.cp_group)
        return mixed.flatten(1)


class SoftmaxAttention(SelfAttention):
    """Megatron's self-attention with a short forward: Megatron 0.16.1 rotates packed rows with a
    host synchronisation for each document, and knows no positions that restart in them."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        rotary_dim: int,
        rope_theta: float,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection=pg_collection)
        self.rotary_dim = rotary_dim
        self.rope_theta = rope_theta

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: RowParams,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """[T, 1, C] -> ([T, 1, C], no bias); T over tp on each rank with sequence parallelism."""
        query, key, value = (
            heads.squeeze(1) for heads in self.get_query_key_value_tensors(hidden_states)
        )
        if self.rotary_dim:
            cos, sin = packed_seq_params.rope(self.rotary_dim, self.rope_theta)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if self.checkpoint_core_attention and self.training:
            mixed = tensor_parallel.checkpoint(
                lambda q, k, v: self.core_attention(q, k, v, packed_seq_params=packed_seq_params),
                False,
                query,
                key,
                value,
            )
        else:
            mixed = self.core_attention(query, key, value, packed_seq_params=packed_seq_params)
        return self.linear_proj(mixed.unsqueeze(1))

    def add_to_cache(self, cache: Cache, slots: int, places: int) -> None:
        """Make room for this layer's keys and values."""
        heads, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        weight = self.linear_proj.weight
        cache.keys_values[self.layer_number] = KeysValues(
            *(weight.new_zeros(slots, heads, places, width) for _ in range(2))
        )
