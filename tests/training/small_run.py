"""A run small enough to train in a second, on every layout; used by the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_m1.config import (
    CheckpointConfig,
    DataConfig,
    LoggerConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from megatron_m1.data.indexed import IndexedWriter
from megatron_m1.model.build import unwrap
from megatron_m1.model.config import ModelConfig
from megatron_m1.model.parameters import local_parameters
from megatron_m1.training.run import Run, build_run
from megatron_m1.training.step import train_step
from parallel.layout import Layout

MODEL = ModelConfig(
    name="small",
    num_layers=4,
    layer_pattern="LLLS",
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    rotary_dim=8,
    ffn_hidden_size=32,
    num_experts=4,
    vocab_size=64,
    aux_loss_coef=1e-2,
)


def write_data(folder: Path) -> str:
    """Documents of skewed lengths (1 to 200) over a small alphabet; returns the prefix."""
    random = np.random.RandomState(0)
    with IndexedWriter(folder / "text", MODEL.vocab_size) as writer:
        for length in [1, 2, 33, 65, 64, *random.geometric(0.04, size=200).clip(1, 200)]:
            start = random.randint(MODEL.vocab_size)
            steps = random.choice([1, 1, 1, 5], size=length)
            writer.add((start + steps.cumsum()) % MODEL.vocab_size)
    return str(folder / "text")


def small_config(folder: str, prefix: str, **sections: Any) -> RunConfig:
    """A run in ``folder`` on ``write_data``'s text; ``sections`` replace whole sections."""
    config = RunConfig(
        model=MODEL,
        data=DataConfig(corpus="indexed", train=[prefix]),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, clip_grad=0.5),
        train=TrainConfig(
            steps=5, global_batch=4, micro_batch=1, seq_length=64, precision="fp32", report=False
        ),
        checkpoint=CheckpointConfig(),
        logger=LoggerConfig(console=False, wandb="disabled"),
        run_dir=folder,
    )
    return replace(config, **sections)


def start(config: RunConfig) -> Run:
    """Build the groups and the run in this process."""
    config.parallel.build_groups()
    return build_run(config)


def curve(config: RunConfig) -> dict[str, Any]:
    """Train to the end; losses, gradient norms, and this rank's parts of the final weights."""
    run = start(config)
    losses, norms = [], []
    while not run.finished:
        result = train_step(run)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    run.finish_parameter_gather()
    return {"losses": losses, "norms": norms, "weights": weight_parts(run)}


def weight_parts(
    run: Run, value: Callable[[Tensor], Tensor] = Tensor.detach
) -> dict[str, tuple[int, int, Tensor]]:
    """(rank, size, part) of each of this rank's parameters, or of what `value` makes of it, in the
    shape of the whole tensor."""
    return {
        local.mapped.ours: (
            local.rank if local.mapped.operation.axis is not None else 0,
            local.size if local.mapped.operation.axis is not None else 1,
            local.mapped.operation.view(value(local.parameter), run.config.model).clone(),
        )
        for chunk in run.chunks
        for local in local_parameters(unwrap(chunk), run.config.model)
    }


def whole_weights(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The weights of the whole model from the parts that all ranks returned."""
    from megatron_m1.checkpoint.mapping import mapped_parameters

    parts: dict[str, dict[int, Tensor]] = {}
    for result in results:
        for name, (rank, _, part) in result["weights"].items():
            parts.setdefault(name, {})[rank] = part
    whole = {}
    for name, mapped in mapped_parameters(MODEL).items():
        pieces = [parts[name][rank] for rank in sorted(parts[name])]
        axis = mapped.operation.axis
        whole[name] = pieces[0] if axis is None else torch.cat(pieces, dim=axis)
    return whole


LAYOUTS: dict[str, tuple[int, Layout]] = {
    "tp2": (2, Layout(tp=2, sequence_parallel=False)),
    "tp2_sp": (2, Layout(tp=2)),
    "pp2": (2, Layout(pp=2)),
    "pp2_interleaved": (2, Layout(pp=2, vpp=2)),
    "pp2_uneven": (2, Layout(pp=2, pipeline_layout="Et|tttL")),
    "pp4": (4, Layout(pp=4)),
    "ep2": (2, Layout(ep=2)),
    "dp2": (2, Layout()),
    "ep2_overlap": (2, Layout(ep=2, moe_overlap_groups=2)),
    "etp2": (2, Layout(etp=2)),
    "etp2_ep2": (4, Layout(tp=2, etp=2, ep=2)),
    "tp2_pp2_ep2": (8, Layout(tp=2, pp=2, ep=2)),
    "cp2": (2, Layout(cp=2)),
    "cp2_zigzag": (2, Layout(cp=2, cp_cut="zigzag")),
    "cp2_tp2": (4, Layout(cp=2, tp=2)),
    "cp2_pp2": (4, Layout(cp=2, pp=2)),
    "cp2_ep2": (2, Layout(cp=2, ep=2)),
    "cp4": (4, Layout(cp=4)),
    "cp4_ep2": (4, Layout(cp=4, ep=2)),
    "cp4_tp2": (8, Layout(cp=4, tp=2)),
    "cp4_pp2": (8, Layout(cp=4, pp=2)),
    "cp2_tp2_pp2_ep2": (8, Layout(cp=2, tp=2, pp=2, ep=2)),
}
