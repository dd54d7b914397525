"""The lightning attention block: projections, decayed linear attention, norm over all heads, gate.

    p = SiLU(u W_qkv)  (q, k, v of a head side by side);  o = lightning(q, k, v)
    y = (RMSNorm(o over all heads) * sigmoid(u W_gate)) W_out

Source: MiniMax-01 (arXiv 2501.08313) section 2.2 and MiniMax-M1's modeling code.

Shapes: T tokens of the packed row, B = 1, C width of the model, H heads on this rank, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from kernels.gated_norm import gated_rms_norm, sum_of_squares
from kernels.lightning import lightning_attention_qkv
from megatron_m1.model.cache import Cache
from megatron_m1.model.row_params import RowParams
from parallel.lasp import Lasp


def decay_slopes(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """The slope s_h of every head in one layer; the state decays by exp(-s_h) a token.

    s_h = base_h * (1 - layer / (num_layers - 1) + 1e-5), base_h = 2^(-8 (h+1) / H) for H a power of
    two, otherwise filled from the next ones as ALiBi does (MiniMax-M1's modeling code).

    Args:
        num_heads: heads of the whole model, on all tensor-parallel ranks.
        layer: 0-based number in the whole model, on all pipeline stages.
        num_layers: layers of the whole model.

    Returns:
        [num_heads] float32, positive.
    """
    factor = 1 - layer / max(num_layers - 1, 1) + 1e-5
    return torch.tensor(_base_slopes(num_heads), dtype=torch.float32) * factor


def _base_slopes(num_heads: int) -> list[float]:
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    if power == num_heads:
        return slopes
    return slopes + _base_slopes(2 * power)[0::2][: num_heads - power]


class AllHeadsNorm(nn.Module):
    """RMSNorm over the channels of all heads, times the sigmoid gate.

    A tensor-parallel rank holds the channels of its own heads, so the sum of squares is summed over
    the group, by an all-reduce that autograd knows: its backward sums too.
    """

    def __init__(
        self,
        config: TransformerConfig,
        width: int,
        eps: float,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.tp_group = tp_group
        self.weight = nn.Parameter(torch.ones(width // tp_group.size(), dtype=config.params_dtype))

    def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
        """hidden and gate (before its sigmoid) [T, B, H*D] -> [T, B, H*D]."""
        if self.tp_group.size() == 1:
            return gated_rms_norm(hidden, gate, self.weight, eps=self.eps)
        squares = all_reduce(sum_of_squares(hidden), group=self.tp_group)
        return gated_rms_norm(hidden, gate, self.weight, squares / self.width, eps=self.eps)

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: Sequence, metadata: dict[str, Any]
    ) -> dict[str, Any]:
        """Megatron stores a parameter of a module without this method as one replicated copy."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


@dataclass
class LightningAttentionSubmodules:
    """Which linear layers the block is made of."""

    linear_qkv: type
    linear_gate: type
    linear_proj: type


class LightningAttention(MegatronModule):
    """Lightning attention in the place of a Megatron layer's ``self_attention``."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LightningAttentionSubmodules,
        layer_number: int,
        norm_eps: float,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        self.head_dim = config.kv_channels
        width = config.num_attention_heads * self.head_dim
        self.linear_qkv = self._column(submodules.linear_qkv, 3 * width)
        self.linear_gate = self._column(submodules.linear_gate, width)
        self.linear_proj = build_module(
            submodules.linear_proj,
            width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=self.tp_group,
        )
        self.norm = AllHeadsNorm(config, width, norm_eps, self.tp_group)
        # Not a buffer: Float16Module would round it to bfloat16.
        self.decay = self._local_heads(
            decay_slopes(config.num_attention_heads, layer_number - 1, config.num_layers)
        )

    def _column(self, linear: type, output_size: int) -> nn.Module:
        return build_module(
            linear,
            self.config.hidden_size,
            output_size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def _local_heads(self, slopes: Tensor) -> Tensor:
        return slopes.chunk(self.tp_group.size())[self.tp_group.rank()].clone()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: RowParams,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """[T, 1, C] -> ([T, 1, C], no bias); T over tp on each rank with sequence parallelism."""
        qkv, _ = self.linear_qkv(hidden_states)
        finish = self._begin(qkv, packed_seq_params)
        # Between the two, while the states of context-parallel ranks are under way.
        gate, _ = self.linear_gate(hidden_states)
        return self.linear_proj(self.norm(finish(), gate))

    def _begin(self, qkv: Tensor, row: RowParams) -> Callable[[], Tensor]:
        """Start the attention of [T, 1, 3*H*D]; what is returned finishes it: [T, 1, H*D]."""
        tokens = qkv.shape[0]
        qkv_1THD = qkv.view(1, tokens, -1, 3 * self.head_dim)
        self.decay = decay = self.decay.to(qkv.device)
        if row.cached is not None:
            mixed = row.cached.lightning(self.layer_number, qkv_1THD[0], decay)
            return lambda: mixed[:, None]
        cu_seqlens = row.cu_seqlens_q
        if row.shard is None:
            return lambda: lightning_attention_qkv(
                qkv_1THD, decay, cu_seqlens=cu_seqlens, silu=True
            ).view(tokens, 1, -1)
        lasp = Lasp.begin(
            qkv_1THD,
            decay=decay,
            plan=row.shard.states,
            group=self.cp_group,
            cu_seqlens=cu_seqlens,
            silu=True,
        )
        return lambda: lasp.finish().view(tokens, 1, -1)

    def add_to_cache(self, cache: Cache, slots: int, places: int) -> None:
        """Make room for this layer's states."""
        shape = slots, self.decay.shape[0], self.head_dim, self.head_dim
        device = self.norm.weight.device
        cache.states[self.layer_number] = torch.zeros(shape, device=device)

    def backward_dw(self) -> None:
        """Delayed weight gradients, which Megatron's overlapped schedules ask every mixer for."""
        for linear in (self.linear_qkv, self.linear_gate, self.linear_proj):
            linear.backward_dw()
