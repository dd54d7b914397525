"""The model as Megatron-core layer specs: which module stands where in each layer."""

from __future__ import annotations

from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_m1.model.config import LIGHTNING, ModelConfig
from megatron_m1.model.lightning_attention import LightningAttention, LightningAttentionSubmodules
from megatron_m1.model.moe import MoE, spec_provider
from megatron_m1.model.norm import RMSNorm
from megatron_m1.model.softmax_attention import SoftmaxAttention, VarlenCoreAttention
from megatron_m1.model.transformer_layer import DeepNormLayer, ScaledResidual


def layer_spec(model: ModelConfig, kind: str) -> ModuleSpec:
    """One layer with lightning (L) or softmax (S) attention."""
    norm = ModuleSpec(module=RMSNorm, params={"returns_residual": True})
    residual = ModuleSpec(
        module=ScaledResidual,
        params={"alpha": model.residual_alpha, "beta": model.deepnorm_beta},
    )
    return ModuleSpec(
        module=DeepNormLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_lightning(model) if kind == LIGHTNING else _softmax(model),
            self_attn_bda=residual,
            pre_mlp_layernorm=norm,
            # A class, not a spec: Megatron gives specs other than its own MoELayer no groups.
            mlp=MoE,
            mlp_bda=residual,
        ),
    )


def _lightning(model: ModelConfig) -> ModuleSpec:
    linears = spec_provider()
    return ModuleSpec(
        module=LightningAttention,
        params={"norm_eps": model.lightning_norm_eps},
        submodules=LightningAttentionSubmodules(
            linear_qkv=linears.column_parallel_linear(),
            linear_gate=linears.column_parallel_linear(),
            linear_proj=linears.row_parallel_linear(),
        ),
    )


def _softmax(model: ModelConfig) -> ModuleSpec:
    linears = spec_provider()
    return ModuleSpec(
        module=SoftmaxAttention,
        params={"rotary_dim": model.rotary_dim, "rope_theta": model.rope_theta},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linears.column_parallel_linear(),
            core_attention=VarlenCoreAttention,
            linear_proj=linears.row_parallel_linear(),
        ),
    )


def block_spec(
    model: ModelConfig, config: TransformerConfig, pp_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of one (virtual) pipeline stage, chosen by their number in the whole model."""
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(model, kind) for kind in model.layer_kinds[first : first + count]],
        layer_norm=RMSNorm,
    )
