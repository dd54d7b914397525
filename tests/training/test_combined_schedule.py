"""Megatron's schedule of one micro-batch beside another trains the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from parallel.layout import Layout
from tests.distributed import Pool
from tests.training.small_run import curve, small_config, write_data

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
