"""Megatron's AdamW over the model chunks."""

from __future__ import annotations

import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import nn

from megatron_m1.config import OptimConfig
from megatron_m1.model.transformer_config import PRECISION

_IS_FLOAT32 = ParamPredicate("float32", lambda parameter: parameter.dtype == torch.float32)


def build_optimizer(
    chunks: list[nn.Module], optim: OptimConfig, precision: str
) -> MegatronOptimizer:
    """AdamW with FP32 master weights and moments. Norm weights are not decayed (Megatron's rule:
    no decay for one-dimensional parameters)."""
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=precision == "bf16",
        params_dtype=PRECISION[precision],
        use_distributed_optimizer=optim.distributed,
        overlap_param_gather=optim.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(settings)
    if settings.bf16:
        # A group of its own for FP32 weights (router, head): in a group of two dtypes Megatron's
        # distributed optimizer takes one weight's moments for another's when it saves.
        overrides[ParamKey(predicate=_IS_FLOAT32)] = {"lr_mult": 1.0}
    optimizer = get_megatron_optimizer(settings, chunks, overrides, use_gloo_process_groups=False)
    for group in optimizer.param_groups:
        # Megatron leaves this to its own scheduler of rates, which the phases stand for here.
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Give every parameter group the rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The L2 norm of the whole gradient; makes it ready for ``clip_and_update``. Collective."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def clip_and_update(optimizer: MegatronOptimizer, norm: float) -> None:
    """The second half of Megatron's step, which is left out where the gradient is not finite: it
    would write that into weights and moments."""
    for part in _parts(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    optimizer.step_with_ready_grads()


def set_clip(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip the gradient to this norm from the coming step on; 0 does not clip."""
    for part in _parts(optimizer):
        part.config.clip_grad = norm


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])
