"""What one sequence keeps while it is decoded."""

from __future__ import annotations

from megatron_m1.model.config import LIGHTNING, SOFTMAX, ModelConfig

_FP32 = 4


def kv_elements(model: ModelConfig) -> int:
    """Numbers that all softmax layers keep for one token: a key and a value in each group."""
    groups = model.num_query_groups * model.head_dim
    return model.layer_kinds.count(SOFTMAX) * 2 * groups


def lightning_state_bytes(model: ModelConfig) -> int:
    """The states of all lightning layers, [H, D, D] each, whatever the length.

    FP32, as the kernels keep them and as vLLM does since its pull request 19592 (which M1's
    deployment guide asks for).
    """
    state = model.num_attention_heads * model.head_dim**2
    return model.layer_kinds.count(LIGHTNING) * state * _FP32


def state_bytes(model: ModelConfig, tokens: int, width: int = 2) -> float:
    """Both, for a context of ``tokens`` tokens with keys and values of ``width`` bytes."""
    return lightning_state_bytes(model) + tokens * kv_elements(model) * width
