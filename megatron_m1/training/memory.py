"""An estimate of the device memory of one process, from sizes alone.

Weights, gradients and optimizer state are exact up to the padding of buffers. Activations count the
tensors that the modules keep for the backward pass; workspaces and fragmentation are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_m1.config import RunConfig
from megatron_m1.model.config import LIGHTNING, ModelConfig

_GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest process."""

    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        parts = ", ".join(
            f"{name} {getattr(self, name) / _GIB:.2f}"
            for name in ("weights", "gradients", "optimizer", "activations")
        )
        return f"{self.total / _GIB:.2f} GiB on the fullest process ({parts})"


def estimate(config: RunConfig, world_size: int) -> Memory:
    """Memory of the fullest pipeline stage, whichever that is."""
    stages = _stages(config)
    return max(
        (_stage_memory(config, world_size, stages, index) for index in range(len(stages))),
        key=lambda memory: memory.total,
    )


def _stages(config: RunConfig) -> list[str]:
    """The kinds of layer on each pipeline rank, as one string a rank."""
    kinds, layout = config.model.layer_kinds, config.parallel
    if layout.pipeline_layout is None:
        pieces = layout.pp * (layout.vpp or 1)
        size = len(kinds) // pieces
        parts = [kinds[i * size : (i + 1) * size] for i in range(pieces)]
    else:
        from megatron.core.transformer.pipeline_parallel_layer_layout import (
            PipelineParallelLayerLayout,
        )

        counts = [
            part.count("decoder")
            for part in PipelineParallelLayerLayout.parse_str_to_list(layout.pipeline_layout)
        ]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        parts = [kinds[at : at + count] for at, count in zip(starts, counts, strict=True)]
    return ["".join(parts[rank :: layout.pp]) for rank in range(layout.pp)]


def _stage_memory(
    config: RunConfig, world_size: int, stages: list[str], index: int
) -> Memory:
    model, layout = config.model, config.parallel
    experts = model.num_experts * model.expert_params()
    dense = sum(model.layer_params(kind, 0) for kind in stages[index]) / layout.tp
    ends = (index == 0) + (index == len(stages) - 1)
    dense += ends * model.vocab_size * model.hidden_size / layout.tp
    dense += model.hidden_size * (index == len(stages) - 1)
    sparse = len(stages[index]) * experts / (layout.ep * layout.etp)

    weight_bytes = 2 if config.train.precision == "bf16" else 4
    # FP32 moments, and an FP32 copy of the weights where they are not FP32 themselves.
    state_bytes = 12 if config.train.precision == "bf16" else 8
    sharded = config.optim.distributed
    dense_parts = layout.data_parallel(world_size) if sharded else 1
    sparse_parts = layout.expert_data_parallel(world_size) if sharded else 1
    return Memory(
        parameters=round(dense + sparse),
        weights=(dense + sparse) * weight_bytes,
        gradients=(dense + sparse) * 4.0,
        optimizer=state_bytes * (dense / dense_parts + sparse / sparse_parts),
        activations=_activations(config, stages, index, weight_bytes),
    )


def _activations(config: RunConfig, stages: list[str], index: int, width: int) -> float:
    """Bytes kept between forward and backward of the micro-batches in flight (1F1B)."""
    model, layout, train = config.model, config.parallel, config.train
    tokens = train.micro_batch * train.seq_length
    in_flight = min(len(stages) - index, max(train.global_batch // train.micro_batch, 1))
    layers = [_layer_activations(model, kind, width) for kind in stages[index]]
    if train.recompute == "full":
        kept = len(layers) * model.hidden_size * width
        kept = kept * in_flight + max(layers, default=0)
    else:
        kept = sum(layers) * in_flight
    total = kept * tokens / layout.tp
    if index == len(stages) - 1:
        # FP32 logits and their softmax.
        total += 2 * 4.0 * tokens * model.vocab_size / layout.tp
    return total


def _layer_activations(model: ModelConfig, kind: str, width: int) -> float:
    """Bytes a token that one layer keeps without recomputation, before division by tp."""
    inner = model.num_attention_heads * model.head_dim
    if kind == LIGHTNING:
        # qkv before and after SiLU, gate, mixed heads, normed heads.
        attention = (3 + 3 + 1 + 1 + 1) * inner
    else:
        attention = 3 * inner + 4 * model.num_query_groups * model.head_dim
    # Per chosen expert: its input, gate and up, their product, its output.
    expert = 2 * model.hidden_size + 3 * model.ffn_hidden_size
    return width * (4 * model.hidden_size + attention + model.router_topk * expert)
