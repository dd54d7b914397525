"""The estimate of a dry run against the bytes of real tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_m1.config import RunConfig
from megatron_m1.planning.memory import Memory, estimate
from megatron_m1.training.run import Run
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.distributed import Pool
from tests.training.small_run import small_config, start, write_data

CASES = {
    "one_process": (1, Layout(), "fp32"),
    "one_process_bf16": (1, Layout(), "bf16"),
    "dp2_bf16": (2, Layout(), "bf16"),
    "ep2_bf16": (2, Layout(ep=2), "bf16"),
    "tp2": (2, Layout(tp=2, etp=2), "fp32"),
    "cp2_bf16": (2, Layout(cp=2), "bf16"),
    "pp2_bf16": (2, Layout(pp=2, pipeline_layout="Et|tttL"), "bf16"),
}


def size(tensors: Iterator[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_tensors(run: Run, kept_by_model: set[int]) -> Iterator[Tensor]:
    """Moments and master weights; FP32 weights are the model's own."""
    for part in run.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            yield from (state["exp_avg"], state["exp_avg_sq"])
        for group in part.optimizer.param_groups:
            for weight in group["params"]:
                if weight.untyped_storage().data_ptr() not in kept_by_model:
                    yield weight


def measured(config: RunConfig) -> dict[str, Any]:
    """Bytes after one step."""
    run = start(config)
    train_step(run)
    weights = [weight for chunk in run.chunks for weight in chunk.parameters()]
    buffers = [b for chunk in run.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "weights": size(iter(weights)),
        "gradients": size(buffer.grad_data for buffer in buffers),
        "optimizer": size(optimizer_tensors(run, storages)),
    }


@pytest.mark.parametrize("name", CASES)
def test_estimate_is_the_fullest_process(
    name: str, ranks: Callable[[int], Pool], tmp_path: Path
) -> None:
    world, layout, precision = CASES[name]
    config = small_config(str(tmp_path), write_data(tmp_path), parallel=layout)
    config = replace(config, train=replace(config.train, precision=precision))
    fullest = max(ranks(world).run(measured, config), key=lambda found: found["weights"])
    estimated = estimate(config, world)
    for part, real in fullest.items():
        assert getattr(estimated, part) == pytest.approx(real, rel=0.02), part


def test_without_the_distributed_optimizer_every_process_holds_all_of_its_state(
    tmp_path: Path,
) -> None:
    config = small_config(str(tmp_path), "unused")
    divided = estimate(config, 8)
    config.optim.distributed = False
    whole = estimate(config, 8)
    assert whole.optimizer == pytest.approx(8 * divided.optimizer)
    assert (whole.weights, whole.gradients) == (divided.weights, divided.gradients)


def test_memory_is_the_sum_of_its_parts() -> None:
    memory = Memory(1, weights=2**30, gradients=2**31, optimizer=0, activations=0, workspace=2**29)
    assert memory.describe().startswith("3.50 GiB on the fullest process (weights 1.00, ")
    assert memory.total == sum(memory.parts().values())
