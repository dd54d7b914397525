"""Bytes that a process keeps between forward and backward: what autograd saves, module by module.

Exact for the modules of this project with PyTorch's norm on a GPU, which saves its input and one
number a token, and without Transformer Engine, whose experts keep F values more for each choice.

Shapes: C width, H heads, D head size, K key/value heads, F expert FFN width, E experts.
"""

from __future__ import annotations

from megatron_m1.config import RunConfig
from megatron_m1.model.config import LIGHTNING, ModelConfig
from megatron_m1.planning.stages import Stage
from parallel.layout import Layout

WIDTH = {"bf16": 2, "fp32": 4}
_FP32, _INT64 = 4, 8
_STATE_TOKENS = 512
"""Lightning attention keeps at most one state for so many tokens
(``kernels.lightning.fused.SHORTEST_PIECE``)."""


def kept(config: RunConfig, world_size: int, stage: Stage) -> float:
    """Bytes of the micro-batches in flight (1F1B) on one rank of the stage."""
    layers = sum(layer_bytes(config, kind) for kind in stage.kinds)
    total = layers * in_flight(config, world_size, stage)
    if config.train.recompute == "full":
        again = max((_without_recomputation(config, kind) for kind in stage.kinds), default=0)
        total += again
    if stage.has_head:
        # Input of the final norm, and the gradient of the head's input until the backward comes.
        total += config.model.hidden_size * (_residual_width(config) + _head_width(config))
    return total * local_tokens(config)


def local_tokens(config: RunConfig) -> float:
    """Tokens of a micro-batch on one context-parallel rank."""
    return config.train.micro_batch * config.train.seq_length / config.parallel.cp


def in_flight(config: RunConfig, world_size: int, stage: Stage) -> float:
    """Micro-batches whose activations a stage keeps at once; virtual stages are parts of one.

    1F1B and its interleaved form (Narayanan et al., arXiv 2104.04473, section 2.2).
    """
    layout, train = config.parallel, config.train
    all_of_them = train.global_batch // (train.micro_batch * layout.data_parallel(world_size))
    after = layout.pp - stage.rank - 1
    if layout.vpp is None:
        return min(after + 1, all_of_them)
    return min((2 * after + (layout.vpp - 1) * layout.pp + 1) / layout.vpp, all_of_them)


def layer_bytes(config: RunConfig, kind: str) -> float:
    """Of one layer for each token, with the recomputation that is chosen."""
    model, train = config.model, config.train
    if train.recompute == "full":
        return model.hidden_size * _residual_width(config)
    again = train.recompute_modules if train.recompute == "selective" else []
    total = _residual_bytes(config) + _mixer_bytes(config, kind)
    if "core_attn" in again and kind != LIGHTNING:
        total -= _core_attention_bytes(model, config.parallel, kind)
    if "moe" in again:
        return total + model.hidden_size * WIDTH[train.precision] / config.parallel.tp
    return total + _moe_bytes(config)


def _without_recomputation(config: RunConfig, kind: str) -> float:
    return _residual_bytes(config) + _mixer_bytes(config, kind) + _moe_bytes(config)


def _residual_width(config: RunConfig) -> float:
    """Bytes of one number between the tensor-parallel regions, on each of their ranks."""
    layout = config.parallel
    return WIDTH[config.train.precision] / (layout.tp if layout.uses_sequence_parallel else 1)


def _residual_bytes(config: RunConfig) -> float:
    """Inputs of both norms with their root mean squares, input of the mixer's projections."""
    values = 3 * config.model.hidden_size * _residual_width(config)
    return values + 2 * _FP32 / WIDTH[config.train.precision] * _residual_width(config)


def _mixer_bytes(config: RunConfig, kind: str) -> float:
    model, layout, width = config.model, config.parallel, WIDTH[config.train.precision]
    inner, groups = model.num_attention_heads * model.head_dim, model.num_query_groups
    if kind == LIGHTNING:
        # Fused qkv; mixed heads and gate; gated heads; mean square of all heads.
        total = 6 * inner * width / layout.tp + _FP32
    else:
        # Rotated q and k; the fused projection, of which v is a view; mixed heads.
        total = (3 * inner + 3 * groups * model.head_dim) * width / layout.tp
    return total + _core_attention_bytes(model, layout, kind)


def _core_attention_bytes(model: ModelConfig, layout: Layout, kind: str) -> float:
    """What attention keeps beside its inputs and output: states, or log-sum-exp."""
    of_head = _FP32 * model.head_dim**2 / _STATE_TOKENS if kind == LIGHTNING else _FP32
    return of_head * model.num_attention_heads / layout.tp


def _moe_bytes(config: RunConfig) -> float:
    """Each tensor-parallel rank brings a share of the tokens."""
    model, layout, width = config.model, config.parallel, WIDTH[config.train.precision]
    router = _FP32 * model.hidden_size + 5 * model.num_experts
    # Index, place and probability twice; rows that came, gate and up.
    chosen = 2 * (_INT64 + _FP32)
    rows = layout.etp * model.hidden_size + 2 * model.ffn_hidden_size
    if layout.etp > 1:
        # Megatron's own linear layers keep the input of the second product and of its activation.
        rows += 2 * model.ffn_hidden_size
    return (router + model.router_topk * (chosen + rows * width)) / layout.tp


def _head_width(config: RunConfig) -> float:
    """Bytes of one number of the head's input, which all ranks of tp have whole."""
    return _FP32 if config.model.fp32_lm_head else WIDTH[config.train.precision]
