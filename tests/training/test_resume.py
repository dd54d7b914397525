"""Stopping and going on, in the same layout and in another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_m1.checkpoint import store
from megatron_m1.config import RunConfig
from megatron_m1.training.run import Run
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.distributed import Pool
from tests.training.small_run import small_config, start, weight_parts, whole_weights, write_data

SAME_LAYOUT: dict[str, tuple[int, Layout, dict[str, Any]]] = {
    "one_process": (1, Layout(), {}),
    "bf16": (1, Layout(), {"precision": "bf16"}),
    "distributed_optimizer": (2, Layout(), {}),
    "pp2_interleaved": (2, Layout(pp=2, vpp=2), {}),
}
OTHER_LAYOUT: dict[str, tuple[tuple[int, Layout], tuple[int, Layout]]] = {
    "tp2_to_pp2_ep2": ((2, Layout(tp=2)), (4, Layout(pp=2, ep=2))),
    "pp2_ep2_to_tp2": ((4, Layout(pp=2, ep=2)), (2, Layout(tp=2))),
    "ep2_to_etp2": ((2, Layout(ep=2)), (2, Layout(tp=2, etp=2))),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def config_of(folder: Path, prefix: str, layout: Layout, **train: Any) -> RunConfig:
    config = small_config(str(folder), prefix, parallel=layout)
    return replace(config, train=replace(config.train, steps=10, **train))


def losses(run: Run, steps: int) -> list[float]:
    return [train_step(run).loss for _ in range(steps)]


def straight(config: RunConfig) -> dict[str, Any]:
    """Ten steps, with the state after five on disk."""
    run = start(config)
    before = losses(run, 5)
    store.save(run)
    saved = weight_parts(run)
    return {"losses": before + losses(run, 5), "saved": saved, "weights": weight_parts(run)}


def resumed(config: RunConfig, checkpoint: Path) -> dict[str, Any]:
    """The last five steps by a run that knows nothing but the checkpoint."""
    run = start(replace(config, seed=config.seed))
    store.load(run, checkpoint)
    loaded = weight_parts(run)
    return {"losses": losses(run, 5), "weights": loaded, "step": run.progress.step}


@pytest.mark.parametrize("name", SAME_LAYOUT)
def test_same_layout_goes_on_bit_for_bit(
    name: str, ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    size, layout, train = SAME_LAYOUT[name]
    config = config_of(tmp_path, prefix, layout, **train)
    first = ranks(size).run(straight, config)
    second = ranks(size).run(resumed, config, tmp_path / "checkpoints" / "step_000005")
    assert [r["losses"] for r in second] == [r["losses"][5:] for r in first]
    assert second[0]["step"] == 10


@pytest.mark.parametrize("name", OTHER_LAYOUT)
def test_another_layout_goes_on(
    name: str, ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    (size, layout), (other_size, other) = OTHER_LAYOUT[name]
    first = ranks(size).run(straight, config_of(tmp_path, prefix, layout))
    second = ranks(other_size).run(
        resumed, config_of(tmp_path, prefix, other), tmp_path / "checkpoints" / "step_000005"
    )
    for result in second:
        assert result["losses"] == pytest.approx(first[0]["losses"][5:], rel=1e-5)
    saved = whole_weights([{"weights": result["saved"]} for result in first])
    loaded = whole_weights(second)
    assert saved.keys() == loaded.keys()
    for weight, tensor in saved.items():
        torch.testing.assert_close(loaded[weight], tensor, rtol=0, atol=0, msg=weight)
