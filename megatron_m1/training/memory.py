"""An estimate of the device memory of one process, from sizes alone.

Weights, gradients and optimizer state are exact up to the padding of buffers. Activations count the
tensors that the modules keep for the backward pass; workspaces and fragmentation are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_m1.config import RunConfig, TrainConfig
from megatron_m1.model.config import LIGHTNING, ModelConfig
from megatron_m1.pipeline_stages import stages
from parallel.layout import Layout

_GIB = 2**30
_BF16, _FP32 = 2, 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one process."""

    parameters: float
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


@dataclass(frozen=True)
class _Stage:
    """What a pipeline rank holds.

    Attributes:
        index: the rank.
        kinds: a letter for each of its layers.
    """

    index: int
    kinds: str
    has_embedding: bool
    has_head: bool


def estimate(config: RunConfig, world_size: int) -> Memory:
    """Memory of a process of the fullest pipeline stage, whichever that is."""
    found = [_of_stage(config, world_size, stage) for stage in _stages(config)]
    return max(found, key=lambda memory: memory.total)


def _stages(config: RunConfig) -> list[_Stage]:
    kinds, layout = iter(config.model.layer_kinds), config.parallel
    # In Megatron's order of layers; t is a layer of the next kind.
    parts = [
        "".join(next(kinds) if letter == "t" else letter.lower() for letter in part)
        for part in stages(layout, config.model.num_layers)
    ]
    held = ["".join(parts[rank :: layout.pp]) for rank in range(layout.pp)]
    return [
        _Stage(rank, letters.strip("el"), "e" in letters, "l" in letters)
        for rank, letters in enumerate(held)
    ]


def _of_stage(config: RunConfig, world_size: int, stage: _Stage) -> Memory:
    model, layout, optim = config.model, config.parallel, config.optim
    is_bf16 = config.train.precision == "bf16"
    dense, experts = _dense_parameters(model, layout, stage), _experts(model, layout, stage)
    float32 = _float32_parameters(model, layout, stage) if is_bf16 else dense + experts
    lower = dense + experts - float32

    dense_parts = layout.data_parallel(world_size) if optim.distributed else 1
    expert_parts = layout.expert_data_parallel(world_size) if optim.distributed else 1
    # Two moments, and an FP32 copy of each weight that is not FP32 itself.
    optimizer = (2 * _FP32) * (dense / dense_parts + experts / expert_parts)
    if is_bf16:
        optimizer += _FP32 * ((dense - float32) / dense_parts + experts / expert_parts)
    return Memory(
        parameters=dense + experts,
        weights=_BF16 * lower + _FP32 * float32,
        gradients=_FP32 * (dense + experts),
        optimizer=optimizer,
        activations=_activations(config, world_size, stage),
    )


def _dense_parameters(model: ModelConfig, layout: Layout, stage: _Stage) -> float:
    """Parameters outside the experts. Routers and the layers' norms are on every process."""
    total = 0.0
    for kind in stage.kinds:
        total += model.attention_params(kind) / layout.tp
        total += model.router_params() + 2 * model.hidden_size
    ends = stage.has_embedding + stage.has_head
    total += ends * model.vocab_size * model.hidden_size / layout.tp
    return total + stage.has_head * model.hidden_size


def _experts(model: ModelConfig, layout: Layout, stage: _Stage) -> float:
    layer = model.num_experts * model.expert_params()
    return len(stage.kinds) * layer / (layout.ep * layout.etp)


def _float32_parameters(model: ModelConfig, layout: Layout, stage: _Stage) -> float:
    """Those that stay FP32 in a model of lower precision: routers, and the head where asked."""
    head = model.vocab_size * model.hidden_size / layout.tp
    return len(stage.kinds) * model.router_params() + stage.has_head * model.fp32_lm_head * head


def _activations(config: RunConfig, world_size: int, stage: _Stage) -> float:
    """Bytes kept between forward and backward of the micro-batches in flight (1F1B)."""
    model, layout, train = config.model, config.parallel, config.train
    width = _BF16 if train.precision == "bf16" else _FP32
    layers = [width * _kept_values(model, train, kind) for kind in stage.kinds]
    if train.recompute == "full":
        inputs = width * model.hidden_size * len(layers)
        kept = inputs * _in_flight(config, world_size, stage) + max(layers, default=0)
    else:
        kept = sum(layers) * _in_flight(config, world_size, stage)
    # FP32 logits and their softmax.
    kept += stage.has_head * 2 * _FP32 * model.vocab_size
    return kept * train.micro_batch * train.seq_length / layout.tp


def _in_flight(config: RunConfig, world_size: int, stage: _Stage) -> float:
    """Micro-batches whose activations this stage keeps at once; virtual stages are parts of one."""
    layout, train = config.parallel, config.train
    all_of_them = train.global_batch // (train.micro_batch * layout.data_parallel(world_size))
    after = layout.pp - stage.index - 1
    if layout.vpp is None:
        return min(after + 1, all_of_them)
    return min((2 * after + (layout.vpp - 1) * layout.pp + 1) / layout.vpp, all_of_them)


def _kept_values(model: ModelConfig, train: TrainConfig, kind: str) -> float:
    """Numbers that one layer keeps for each token, before division by tp."""
    skipped = train.recompute_modules if train.recompute == "selective" else []
    inner = model.num_attention_heads * model.head_dim
    if kind == LIGHTNING:
        # qkv, gate, mixed heads, normed heads; and qkv after SiLU.
        attention = 6 * inner + (0 if "core_attn" in skipped else 3 * inner)
    else:
        attention = 3 * inner + 4 * model.num_query_groups * model.head_dim
    # Per chosen expert: its input, gate and up, its output.
    expert = 2 * model.hidden_size + 2 * model.ffn_hidden_size
    experts = 0 if "moe" in skipped else model.router_topk * expert
    return 4 * model.hidden_size + attention + experts
