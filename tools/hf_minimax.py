"""transformers' MiniMaxForCausalLM in our sizes, and its tensors in MiniMax's checkpoint names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import MiniMaxConfig

from megatron_m1.model.config import LIGHTNING, ModelConfig


def hf_config(model: ModelConfig, **more: Any) -> MiniMaxConfig:
    """Our sizes in the words of transformers 5. It rotates whole heads, whatever rotary_dim is."""
    alpha, beta = model.residual_alpha, model.deepnorm_beta
    scales = {
        f"{part}_{name}_factor": value
        for part in ("full_attn", "linear_attn", "mlp")
        for name, value in (("alpha", alpha), ("beta", beta))
    }
    return MiniMaxConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        num_local_experts=model.num_experts,
        num_experts_per_tok=model.router_topk,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        layer_types=[
            "linear_attention" if kind == LIGHTNING else "full_attention"
            for kind in model.layer_kinds
        ],
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        **scales,
        **more,
    )


def in_checkpoint_names(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's (name, view) pairs of one parameter of transformers 5, which stacks the
    experts in memory."""
    if ".mlp." not in name:
        yield name, tensor
        return
    layer, part = name.split(".mlp.")
    prefix = f"{layer}.block_sparse_moe."
    if part == "gate.weight":
        yield f"{prefix}gate.weight", tensor
    elif part == "experts.gate_up_proj":
        for number, expert in enumerate(tensor):
            gate, up = expert.chunk(2)
            yield f"{prefix}experts.{number}.w1.weight", gate
            yield f"{prefix}experts.{number}.w3.weight", up
    else:
        for number, expert in enumerate(tensor):
            yield f"{prefix}experts.{number}.w2.weight", expert
