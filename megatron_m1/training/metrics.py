"""What is recorded of a step."""

from __future__ import annotations

import resource

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import track_moe_metrics
from torch import Tensor

from megatron_m1.model.build import unwrap
from megatron_m1.model.router import Float32Router
from megatron_m1.observe.sinks import Metrics
from megatron_m1.training.run import Run
from megatron_m1.training.state import Training
from megatron_m1.training.step import StepResult
from parallel import host
from parallel.packing import PackedRow

# Dense bfloat16 peak in FLOP/s by a part of the device's name, from NVIDIA's data sheets.
_BF16_PEAK = {"H800": 989.4e12, "H100": 989.4e12, "H200": 989.4e12, "A800": 312e12, "A100": 312e12}


def step_metrics(run: Run, result: StepResult, seconds: float) -> Metrics:
    """The record of one step, the same on every process. Collective."""
    tokens_per_second = result.tokens / seconds
    spent = run.sections.take()
    flops = run.config.model.flops_per_token(mean_document_length(result.rows))
    metrics: Metrics = {
        "train/step": run.progress.step,
        "train/loss": result.loss,
        "train/tokens": run.progress.tokens,
        "train/samples": run.reader.consumed,
        "optim/lr": result.learning_rate,
        "optim/grad_norm": result.grad_norm,
        "optim/skipped": run.progress.skipped,
        "perf/tokens_per_s": tokens_per_second,
        "perf/tflops": tokens_per_second * flops / dist.get_world_size() / 1e12,
        "perf/peak_mem_gib": peak_memory() / 2**30,
        "time/step": seconds,
        "time/data": spent["data"],
        "time/forward_backward": spent["forward_backward"],
        "time/reduce": spent["reduce"],
        "time/optimizer": spent["optimizer"],
        **cut_balance(result.rows),
        **_router_losses(run, len(result.rows)),
        **expert_load(run),
    }
    peak = peak_flops(run.config.train.precision)
    if peak:
        metrics["perf/mfu"] = tokens_per_second * flops / dist.get_world_size() / peak
    return metrics


def mean_document_length(rows: list[PackedRow]) -> float:
    """Mean length of the documents that a token sits in: sum of squares over sum. What softmax
    attention costs grows with it, not with the row."""
    lengths = torch.cat([row.document_bounds.diff() for row in rows]).double()
    return float(lengths.square().sum() / lengths.sum())


def cut_balance(rows: list[PackedRow]) -> Metrics:
    """How evenly the rows' softmax attention is shared by context-parallel ranks: the busiest over
    the mean, averaged over the rows. Nothing for rows that are not cut."""
    found = [row.shard.cut.imbalance for row in rows if row.shard]
    return {"perf/cp_imbalance": sum(found) / len(found)} if found else {}


def peak_flops(precision: str) -> float | None:
    """The device's peak in FLOP/s where it is known: bfloat16 on the cards in the table."""
    if precision != "bf16" or not host.has_accelerator():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _BF16_PEAK.items() if part in name), None)


def peak_memory() -> float:
    """The most bytes this process has held: on the device, or resident without one."""
    if host.has_accelerator():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _router_losses(run: Run, micro_batches: int) -> Metrics:
    """Megatron's load-balancing loss (1 when balanced) and the z-loss, before their coefficients,
    averaged over layers and micro-batches; those that are switched on."""
    model = run.config.model
    coefficients = {"load_balancing_loss": model.aux_loss_coef, "z_loss": model.z_loss_coef}
    tracked = [name for name, coefficient in coefficients.items() if coefficient]
    losses: dict[str, Tensor] = {}
    track_moe_metrics(
        1 / micro_batches,
        run.progress.step,
        writer=None,
        total_loss_dict=losses,
        force_initialize=True,
        track_names=tracked,
        num_layers=model.num_layers,
    )
    metrics: Metrics = {}
    if "load_balancing_loss" in tracked:
        metrics["train/aux_loss"] = float(losses["load_balancing_loss"])
    if "z_loss" in tracked:
        metrics["train/z_loss"] = float(losses["z_loss"])
    return metrics


def expert_load(run: Training) -> Metrics:
    """How the routers spread the step's tokens over the experts of each layer, and how many of
    their assignments found no room."""
    sent, asked = _take_counts(run)
    load = asked / asked.sum(dim=1, keepdim=True).clamp(min=1)
    metrics: Metrics = {
        "moe/max_violation": float(load.max() * run.config.model.num_experts - 1),
        "moe/drop_frac": 1 - float(sent.sum() / asked.sum().clamp(min=1)),
    }
    every = run.config.logger.moe_load_every
    if every and run.progress.step % every == 0:
        metrics["moe/load"] = [[round(share, 5) for share in row] for row in load.tolist()]
    return metrics


def _take_counts(run: Training) -> tuple[Tensor, Tensor]:
    """Over all processes, [layers, experts] tokens sent and, before any was dropped, asking."""
    model = run.config.model
    counts = torch.zeros(model.num_layers, 2, model.num_experts, device=host.device())
    for chunk in run.chunks:
        for layer in unwrap(chunk).decoder.layers:
            router: Float32Router = layer.mlp.router
            counts[layer.layer_number - 1] = router.take_counts()
    dist.all_reduce(counts)
    return counts[:, 0], counts[:, 1]
