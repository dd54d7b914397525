"""The released MiniMax-M1 without its weights: configuration and index, from its public description
(the config.json and the index of the model's page), and not from our table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAYERS, EXPERTS, SHARDS = 80, 32, 413
TOTAL_SIZE = 912_210_767_872
ALPHA = 3.5565588200778455

CONFIG: dict[str, Any] = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [int(layer % 8 == 7) for layer in range(LAYERS)],
    "auto_map": {
        "AutoConfig": "configuration_minimax_m1.MiniMaxM1Config",
        "AutoModelForCausalLM": "modeling_minimax_m1.MiniMaxM1ForCausalLM",
    },
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": ALPHA,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": ALPHA,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": ALPHA,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10_240_000,
    "model_type": "minimax_m1",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 8,
    "num_local_experts": EXPERTS,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10_000_000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 200_064,
}


def names() -> Iterator[str]:
    yield "model.embed_tokens.weight"
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        softmax, lightning = (
            ("q_proj", "k_proj", "v_proj", "o_proj"),
            (*("qkv_proj", "output_gate", "norm", "out_proj"),),
        )
        for part in softmax if layer % 8 == 7 else lightning:
            yield f"{prefix}self_attn.{part}.weight"
        yield f"{prefix}input_layernorm.weight"
        yield f"{prefix}post_attention_layernorm.weight"
        yield f"{prefix}block_sparse_moe.gate.weight"
        for expert in range(EXPERTS):
            for matrix in ("w1", "w2", "w3"):
                yield f"{prefix}block_sparse_moe.experts.{expert}.{matrix}.weight"
    yield "model.norm.weight"
    yield "lm_head.weight"


def write_index(folder: Path) -> Path:
    """config.json and the index; no shard is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shards = {
        name: f"model-{number * SHARDS // 8243:05d}-of-{SHARDS:05d}.safetensors"
        for number, name in enumerate(names())
    }
    index = {"metadata": {"total_size": TOTAL_SIZE}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
