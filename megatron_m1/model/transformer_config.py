"""Our sizes and degrees in Megatron-core's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_m1.config import ComputeConfig
from megatron_m1.errors import ConfigError
from megatron_m1.model.config import ModelConfig
from megatron_m1.model.moe import HAVE_TE
from parallel.host import has_accelerator
from parallel.layout import Layout

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class M1TransformerConfig(TransformerConfig):
    """Megatron's configuration and what our modules read beside it.

    Attributes:
        moe_capacity_scope: ``ModelConfig.capacity_scope``.
        moe_overlap_groups: ``Layout.moe_overlap_groups``.
    """

    moe_capacity_scope: str = "ep"
    moe_overlap_groups: int = 1


def transformer_config(
    model: ModelConfig, layout: Layout, train: ComputeConfig | None = None, precision: str = "fp32"
) -> M1TransformerConfig:
    """Megatron's configuration of the model.

    Args:
        train: where the recomputation is taken from; None (inference) recomputes nothing.
        precision: fp32 or bf16, of weights and activations.
    """
    dtype = PRECISION[precision]
    return M1TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=precision == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        deallocate_pipeline_outputs=True,
        batch_p2p_comm=has_accelerator(),
        # Losses and gradients are divided by the number of trained tokens, not of rows.
        calculate_per_token_loss=True,
        # Lightning and softmax layers cannot be stacked under one key of a checkpoint.
        hetereogenous_dist_checkpoint=True,
        # Megatron's own layers make their weights where torch.device() says, Transformer Engine's
        # on the GPU; model.init fills them.
        use_cpu_initialization=not HAVE_TE,
        perform_initialization=False,
        # Named "full" by default, which Megatron itself warns about; graphs are off either way.
        cuda_graph_scope=[],
        bias_activation_fusion=has_accelerator(),
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **_experts(model, layout, train),
        **_degrees(layout),
        **_recomputation(train),
    )


def _experts(model: ModelConfig, layout: Layout, train: ComputeConfig | None) -> dict[str, Any]:
    overlap = layout.overlap_moe_expert_parallel_comm and train is not None
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.ffn_hidden_size,
        "moe_router_topk": model.router_topk,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": model.aux_loss_coef,
        "moe_z_loss_coeff": model.z_loss_coef or None,
        "moe_expert_capacity_factor": model.capacity_factor,
        "moe_token_drop_policy": model.drop_policy,
        "moe_capacity_scope": model.capacity_scope,
        "moe_token_dispatcher_type": _dispatcher(layout),
        "moe_flex_dispatcher_backend": "deepep",
        "moe_overlap_groups": layout.moe_overlap_groups,
        "overlap_moe_expert_parallel_comm": overlap,
        "moe_grouped_gemm": HAVE_TE,
    }


def _dispatcher(layout: Layout) -> str:
    """Megatron's name of what carries tokens to their experts.

    Raises:
        ConfigError: its package is not there.
    """
    if layout.moe_dispatcher == "alltoall":
        return "alltoall"
    missing = []
    if not HAVE_DEEP_EP:
        missing.append("the package deep_ep (DeepEP)")
    if not has_accelerator():
        missing.append("a CUDA device")
    if missing:
        needs = f"parallel.moe_dispatcher=deepep needs {' and '.join(missing)}"
        raise ConfigError([f"{needs}: use parallel.moe_dispatcher=alltoall where there is none"])
    return "flex"


def _degrees(layout: Layout) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "pipeline_model_parallel_layout": layout.pipeline_layout,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.uses_sequence_parallel,
    }


def _recomputation(train: ComputeConfig | None) -> dict[str, Any]:
    if train is None or train.recompute == "none":
        return {}
    if train.recompute == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(train.recompute_modules),
        }
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
