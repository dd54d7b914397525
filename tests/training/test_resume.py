"""Stopping and going on, in the same layout and in another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_m1.checkpoint import store
from megatron_m1.config import CheckpointConfig, RunConfig
from megatron_m1.errors import InputError
from megatron_m1.observe.sinks import Metrics
from megatron_m1.pretrain import pretrain
from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.callbacks.defaults import default_callbacks
from megatron_m1.training.loop import train
from megatron_m1.training.run import Run, build_run
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.distributed import Pool
from tests.training.small_run import small_config, start, weight_parts, whole_weights, write_data

SAME_LAYOUT: dict[str, tuple[int, Layout, dict[str, Any]]] = {
    "one_process": (1, Layout(), {}),
    "bf16": (1, Layout(), {"precision": "bf16"}),
    "distributed_optimizer": (2, Layout(), {}),
    "pp2_interleaved": (2, Layout(pp=2, vpp=2), {}),
    "tp2_bf16": (2, Layout(tp=2), {"precision": "bf16"}),
    "cp2_bf16": (2, Layout(cp=2), {"precision": "bf16"}),
}
OTHER_LAYOUT: dict[str, tuple[tuple[int, Layout], tuple[int, Layout]]] = {
    "tp2_to_pp2_ep2": ((2, Layout(tp=2)), (4, Layout(pp=2, ep=2))),
    "pp2_ep2_to_tp2": ((4, Layout(pp=2, ep=2)), (2, Layout(tp=2))),
    "ep2_to_etp2": ((2, Layout(ep=2)), (2, Layout(tp=2, etp=2))),
    "cp2_tp2_to_cp4": ((4, Layout(cp=2, tp=2)), (4, Layout(cp=4))),
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
    run = start(config)
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


def step_losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def test_the_same_command_goes_on(
    single_process: Layout, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that ended at its sixth step, its last save at the fourth, as after a crash."""
    pretrain(config_of(tmp_path / "straight", prefix, Layout()))
    config = config_of(tmp_path / "broken", prefix, Layout())
    crashed = replace(config, checkpoint=CheckpointConfig(every=4, save_at_end=False))
    with pytest.raises(Crash):
        train_until(crashed, 6)
    capsys.readouterr()
    assert pretrain(config).progress.step == 10
    assert "step_000004: going on from step 4" in capsys.readouterr().out
    assert step_losses(tmp_path / "broken") == step_losses(tmp_path / "straight")
    pretrain(config)
    assert "nothing is left to train" in capsys.readouterr().out
    assert len(step_losses(tmp_path / "broken")) == 10


class Crash(Exception):
    pass


def train_until(config: RunConfig, step: int) -> None:
    """``pretrain`` with an end by an exception."""

    class Crasher(Callback):
        def on_step(self, run: Run, metrics: Metrics) -> None:
            if run.progress.step == step:
                raise Crash

    run = build_run(config)
    run.open_sinks()
    try:
        train(run, [*default_callbacks(run), Crasher()])
    finally:
        run.sinks.close()


def test_a_run_that_cannot_start_leaves_nothing(
    single_process: Layout, prefix: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path / "new", prefix, Layout())
    short = tmp_path / "short"
    shutil.copy(f"{prefix}.idx", f"{short}.idx")
    Path(f"{short}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[:-10])
    with pytest.raises(InputError, match="short.bin has .* bytes but its index speaks of"):
        pretrain(replace(config, data=replace(config.data, train=[str(short)])))
    with pytest.raises(InputError, match="nowhere holds no checkpoint"):
        pretrain(replace(config, checkpoint=CheckpointConfig(load=str(tmp_path / "nowhere"))))
    assert not (tmp_path / "new").exists()


def test_folders_that_cannot_be_made_are_told_before_the_first_step(
    single_process: Layout, prefix: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    config = config_of(tmp_path / "file" / "run", prefix, Layout())
    with pytest.raises(InputError, match="run_dir=.*/file/run or checkpoint.dir: .*Not a dir"):
        pretrain(config)
