"""How long an optimizer step takes in a layout: the slowest pipeline rank, its bubble, the update.

    step = m t_max + (sum of t_r - t_max) / vpp + gradients and weights + update

with m micro-batches and t_r the time of one on pipeline rank r (1F1B and its interleaved form,
arXiv 2104.04473, section 2.2). Not counted: launches of kernels, the host, stragglers, unequal
experts and documents, checkpoints. So a step is never faster than this with these efficiencies.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_m1.config import RunConfig
from megatron_m1.planning.communication import Groups
from megatron_m1.planning.config import Plan
from megatron_m1.planning.layer_time import LayerTimes
from megatron_m1.planning.memory import Held, parameters
from megatron_m1.planning.seconds import Seconds
from megatron_m1.planning.stages import Stage, pipeline_ranks

_BF16, _FP32 = 2, 4
EXCHANGES = ("tp", "cp", "ep", "pp", "dp")


@dataclass(frozen=True)
class StepCost:
    """One optimizer step.

    Attributes:
        seconds: of the whole step, by piece: products (projections, experts, attention, lightning,
            head, router), elements (norms, activations, moving rows), gradients (adding them up),
            recomputed, exchanges (tp, cp, ep, pp, dp), bubble, update.
        tokens: of the global batch.
        flops: that the model asks for, for one token.
    """

    seconds: Seconds
    tokens: int
    flops: float
    gpus: int
    peak: float

    @property
    def total(self) -> float:
        return self.seconds.total()

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total

    @property
    def tflops(self) -> float:
        """Of the model, on one GPU."""
        return self.tokens_per_second * self.flops / self.gpus / 1e12

    @property
    def mfu(self) -> float:
        """Share of the BF16 peak that the model's own operations take (arXiv 2204.02311)."""
        return self.tflops * 1e12 / self.peak

    def share(self, *pieces: str) -> float:
        """The part of the step that some pieces take."""
        return sum(self.seconds[piece] for piece in pieces) / self.total


def step_cost(config: RunConfig, plan: Plan, times: LayerTimes | None = None) -> StepCost:
    """The cost of a step of the first global batch of ``config.train``.

    Args:
        times: of the same configuration but for its pipeline, where they are known already.
    """
    train, layout, world = config.train, config.parallel, plan.gpus
    times = times or LayerTimes(config, world, plan)
    ranks = pipeline_ranks(config.model, layout)
    crossing = _pipeline_messages(config, plan, times)
    busy = [_rank_time(stage, times, crossing) for stage in ranks]
    slowest = max(busy, key=Seconds.total)
    micro_batches = train.global_batch // (train.micro_batch * layout.data_parallel(world))
    seconds = Seconds().add(slowest, micro_batches)
    filling = sum(rank.total() for rank in busy) - slowest.total()
    seconds["bubble"] = filling / (layout.vpp or 1)
    held = max((parameters(config.model, layout, stage) for stage in ranks), key=_everything)
    last_backward = slowest.total() * 2 / 3
    seconds["dp"] = _data_parallel(config, plan, held, last_backward)
    seconds["update"] = _update(config, plan, held)
    return StepCost(
        seconds=seconds,
        tokens=train.global_batch * train.seq_length,
        flops=config.model.flops_per_token(times.document),
        gpus=world,
        peak=plan.bf16_tflops * 1e12,
    )


def _rank_time(stage: Stage, times: LayerTimes, crossing: float) -> Seconds:
    """Of one micro-batch on a pipeline rank."""
    total = Seconds(pp=crossing)
    for kind, layer in times.layers.items():
        total.add(layer, stage.kinds.count(kind))
    return total.add(times.head) if stage.has_head else total


def _pipeline_messages(config: RunConfig, plan: Plan, times: LayerTimes) -> float:
    """Each virtual stage takes its input and gives its output, and their gradients."""
    layout = config.parallel
    row = times.tokens * config.model.hidden_size * times.width
    if layout.uses_sequence_parallel:
        row /= layout.tp
    pp = Groups.of(layout, plan.gpus).pp
    return 2 * (layout.vpp or 1) * pp.neighbour(plan, row)


def _data_parallel(config: RunConfig, plan: Plan, held: Held, last_backward: float) -> float:
    """Summing FP32 gradients over the copies of a rank and, with the distributed optimizer,
    gathering the weights that each has updated."""
    optim, groups = config.optim, Groups.of(config.parallel, plan.gpus)
    reduce = groups.dp.ring(plan, _FP32 * held.dense) + groups.edp.ring(plan, _FP32 * held.experts)
    weight = _BF16 if config.train.precision == "bf16" else _FP32
    gather = groups.dp.ring(plan, weight * held.dense + (_FP32 - weight) * held.float32)
    gather += groups.edp.ring(plan, weight * held.experts)
    if not optim.distributed:
        # An all-reduce: its second half brings FP32 gradients back instead of weights.
        return 2 * reduce
    hidden_reduce = last_backward if optim.overlap_grad_reduce else 0.0
    hidden_gather = last_backward / 2 if optim.overlap_param_gather else 0.0
    return max(0.0, reduce - hidden_reduce) + max(0.0, gather - hidden_gather)


def _update(config: RunConfig, plan: Plan, held: Held) -> float:
    """AdamW over this process's share: gradient, weight and both moments are read and written once,
    the gradient once more for its norm; and all gradients are set to zero."""
    layout, optim = config.parallel, config.optim
    copies = layout.cp * layout.data_parallel(plan.gpus)
    share = held.dense / (copies if optim.distributed else 1)
    edp = layout.expert_data_parallel(plan.gpus)
    share += held.experts / (edp if optim.distributed else 1)
    moved = 9 * _FP32 * share + _FP32 * _everything(held)
    return moved / (plan.hbm_tb_per_s * 1e12 * plan.efficiency.memory)


def _everything(held: Held) -> float:
    return held.dense + held.experts
