"""The device memory of one process in training, from sizes alone.

Weights, gradients and optimizer state are exact up to the padding of buffers; activations are those
of ``activations``. The workspace is the largest of what comes and goes in a backward pass: the
gradients of a layer's experts before they are added to the FP32 sums, or those of the head. The
CUDA context, NCCL, libraries and fragmentation are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_m1.config import RunConfig
from megatron_m1.model.config import ModelConfig
from megatron_m1.planning import activations
from megatron_m1.planning.activations import WIDTH
from megatron_m1.planning.stages import Stage, pipeline_ranks
from parallel.layout import Layout

GIB = 2**30
_BF16, _FP32 = 2, 4
_LOGITS_BYTES, _LOGITS_ROWS = 2**25, 512
"""The head makes as many logits at a time (``kernels.logprob.slices``)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one process, and the number of its parameters."""

    parameters: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float

    @property
    def total(self) -> float:
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.workspace)
        return sum(parts)

    def describe(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts().items())
        return f"{self.total / GIB:.2f} GiB on the fullest process ({parts})"

    def parts(self) -> dict[str, float]:
        """Bytes by name."""
        names = ("weights", "gradients", "optimizer", "activations", "workspace")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Held:
    """Parameters on one rank of a stage.

    Attributes:
        dense, experts: outside and inside of the experts.
        float32: of the dense ones, those that stay FP32 in a model of lower precision.
    """

    dense: float
    experts: float
    float32: float


def estimate(config: RunConfig, world_size: int) -> Memory:
    """Memory of a process of the fullest pipeline stage, whichever that is."""
    ranks = pipeline_ranks(config.model, config.parallel)
    return max((of_stage(config, world_size, rank) for rank in ranks), key=lambda m: m.total)


def of_stage(config: RunConfig, world_size: int, stage: Stage) -> Memory:
    """Memory of a process of one stage.

    BF16 training keeps weights in BF16, gradients in FP32, and in the optimizer an FP32 copy of
    each BF16 weight and two moments, which the distributed optimizer divides over the processes
    that hold the same weights (ZeRO-1, arXiv 1910.02054, section 5.1).
    """
    layout, optim = config.parallel, config.optim
    held = parameters(config.model, layout, stage)
    is_bf16 = config.train.precision == "bf16"
    everything = held.dense + held.experts
    float32 = held.float32 if is_bf16 else everything
    dense_parts = layout.data_parallel(world_size) * layout.cp if optim.distributed else 1
    expert_parts = layout.expert_data_parallel(world_size) if optim.distributed else 1
    optimizer = (2 * _FP32) * (held.dense / dense_parts + held.experts / expert_parts)
    if is_bf16:
        copied = (held.dense - held.float32) / dense_parts + held.experts / expert_parts
        optimizer += _FP32 * copied
    return Memory(
        parameters=everything,
        weights=_BF16 * (everything - float32) + _FP32 * float32,
        gradients=_FP32 * everything,
        optimizer=optimizer,
        activations=activations.kept(config, world_size, stage),
        workspace=_workspace(config, stage),
    )


def parameters(model: ModelConfig, layout: Layout, stage: Stage) -> Held:
    """What a rank of the stage holds. Routers and the layers' norms are on every one."""
    table = model.vocab_size * model.hidden_size / layout.tp
    dense = sum(model.attention_params(kind) for kind in stage.kinds) / layout.tp
    dense += len(stage.kinds) * (model.router_params() + 2 * model.hidden_size)
    dense += (stage.has_embedding + stage.has_head) * table + stage.has_head * model.hidden_size
    experts = len(stage.kinds) * layer_experts(model, layout)
    float32 = len(stage.kinds) * model.router_params()
    return Held(dense, experts, float32 + stage.has_head * model.fp32_lm_head * table)


def layer_experts(model: ModelConfig, layout: Layout) -> float:
    """Parameters of the experts of one layer on one process."""
    return model.num_experts * model.expert_params() / (layout.ep * layout.etp)


def _workspace(config: RunConfig, stage: Stage) -> float:
    model, layout = config.model, config.parallel
    width, tokens = WIDTH[config.train.precision], activations.local_tokens(config)
    # Rows of each choice before and after both exchanges, beside the experts' weight gradients.
    rows = 4 * model.router_topk * model.hidden_size * tokens / layout.tp
    layer = width * (layer_experts(model, layout) + rows) if stage.kinds else 0.0
    if not stage.has_head:
        return layer
    head_width = _FP32 if model.fp32_lm_head else width
    vocabulary = model.vocab_size / layout.tp
    logits = min(max(_LOGITS_BYTES / (vocabulary * _FP32), _LOGITS_ROWS), tokens) * vocabulary
    # Gradient of the weight, the head's input from all ranks, and a chunk of logits.
    head = vocabulary * model.hidden_size * _FP32 + tokens * model.hidden_size * head_width
    return max(layer, head + logits * _FP32)
