"""Megatron's schedule of one micro-batch beside another trains the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from megatron_m1.model.build import unwrap
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.distributed import Pool
from tests.training.small_run import curve, small_config, start, write_data

LAYOUTS = {
    "ep2": (2, Layout(ep=2)),
    "ep2_tp2": (2, Layout(ep=2, tp=2)),
    "ep2_pp2": (4, Layout(ep=2, pp=2, vpp=2)),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def curves(prefix: str, layout: Layout, **optim: bool) -> list[dict[str, Any]]:
    """The same steps in the usual order and in Megatron's combined one."""
    found = []
    for combined in (False, True):
        layout = replace(layout, overlap_moe_expert_parallel_comm=combined)
        config = small_config("unused", prefix, parallel=layout)
        train = replace(config.train, steps=3, precision="bf16", global_batch=8)
        config = replace(config, train=train, optim=replace(config.optim, **optim))
        found.append({k: v for k, v in curve(config).items() if k != "weights"})
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_combined_schedule_changes_nothing(
    name: str, ranks: Callable[[int], Pool], prefix: str
) -> None:
    size, layout = LAYOUTS[name]
    for plain, combined in ranks(size).run(curves, prefix, layout):
        assert combined == plain


def kept_graphs(prefix: str, layout: Layout) -> list[str]:
    """What the dispatchers of the experts hold of a graph after a step."""
    config = small_config("unused", prefix, parallel=layout)
    run = start(replace(config, train=replace(config.train, precision="bf16", global_batch=8)))
    train_step(run)
    layers = [layer for chunk in run.chunks for layer in unwrap(chunk).decoder.layers]
    return [
        name
        for layer in layers
        for name, value in vars(layer.mlp.token_dispatcher).items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]


@pytest.mark.parametrize("combined", [False, True])
def test_no_graph_outlives_its_step(
    combined: bool, ranks: Callable[[int], Pool], prefix: str
) -> None:
    layout = Layout(ep=2, overlap_moe_expert_parallel_comm=combined)
    assert ranks(2).run(kept_graphs, prefix, layout) == [[], []]
