"""Spikes of the loss: what is one, where the run goes back to, and what it never reads again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_m1.checkpoint import store
from megatron_m1.config import CheckpointConfig, RunConfig, SpikeConfig
from megatron_m1.training.beginning import begin
from megatron_m1.training.callbacks.checkpointer import Checkpointer
from megatron_m1.training.callbacks.defaults import default_callbacks
from megatron_m1.training.callbacks.rollback import Rollback
from megatron_m1.training.loop import train
from megatron_m1.training.metrics import step_metrics
from megatron_m1.training.run import Run
from megatron_m1.training.state import Progress
from megatron_m1.training.step import train_step
from parallel.packing import PackedRow
from tests.checkpoint.spoil import flip_bit
from tests.distributed import Pool
from tests.training.small_run import small_config, start, write_data

SPIKE = SpikeConfig(deviations=5.0, window=4, steps=2, rollbacks=1)
# Rows of steps 8 and 9.
SPOILED = range(28, 36)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def config_of(folder: Path, prefix: str, spike: SpikeConfig = SPIKE) -> RunConfig:
    config = small_config(str(folder), prefix, checkpoint=CheckpointConfig(every=3))
    train = replace(config.train, steps=12, spike=spike)
    return replace(config, train=train, optim=replace(config.optim, shape="constant"))


def spoil(run: Run) -> None:
    """Let some rows be of tokens that the text never has beside each other."""
    sample = run.reader.sample

    def spoiled(index: int) -> PackedRow:
        row = sample(index)
        if index in SPOILED:
            row.tokens[:] = torch.arange(len(row)) * 31 % 64
            row.labels[:] = row.tokens.flip(0)
        return row

    run.reader.sample = spoiled  # type: ignore[method-assign]


def trained(config: RunConfig) -> dict[str, Any]:
    run = start(config)
    spoil(run)
    assert begin(run)
    train(run, default_callbacks(run))
    run.sinks.close()
    return {"progress": run.progress, "consumed": run.reader.consumed}


def without_the_spike(config: RunConfig, checkpoint: Path, consumed: int) -> list[float]:
    """Losses of a run that goes on from a checkpoint with later rows."""
    run = start(config)
    store.load(run, checkpoint)
    run.reader.consumed = consumed
    return [train_step(run).loss for _ in range(run.config.train.steps - run.progress.step)]


def records(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    texts = [line["text"]["rollback"] for line in lines if "rollback" in line.get("text", {})]
    return [line for line in lines if "train/loss" in line], texts


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_spike_takes_the_run_back_and_its_rows_are_left_out(
    is_damaged: bool, ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    """The second time with a damaged checkpoint at step 6, so that step 3 is the one to take."""
    config = config_of(tmp_path / "run", prefix)
    action = trained_with_damage if is_damaged else trained
    back = 3 if is_damaged else 6
    for result in ranks(2).run(action, config):
        assert result["progress"].step == 12
        assert result["progress"].rollbacks == 1
        assert result["consumed"] == 36 + 4 * (12 - back)
    steps, texts = records(tmp_path / "run")
    numbers = [record["train/step"] for record in steps]
    assert numbers == [*range(1, 10), *range(back + 1, 13)]
    (text,) = texts
    assert text.startswith("the loss of steps 8 to 9 is above ")
    assert text.endswith(f"back to step {back}, without rows {4 * back} to 35")
    source = tmp_path / "run/checkpoints" / f"step_{back:06d}"
    expected = ranks(2).run(without_the_spike, config, source, 36)[0]
    assert [record["train/loss"] for record in steps[9:]] == expected


def trained_with_damage(config: RunConfig) -> dict[str, Any]:
    run = start(config)
    spoil(run)
    assert begin(run)
    sample = run.reader.sample

    def damaging(index: int) -> PackedRow:
        if index == SPOILED[-1] and run.progress.step == 8:
            flip_bit(run.checkpoint_dir / "step_000006/__0_0.distcp")
        return sample(index)

    run.reader.sample = damaging  # type: ignore[method-assign]
    train(run, default_callbacks(run))
    run.sinks.close()
    return {"progress": run.progress, "consumed": run.reader.consumed}


def restarted(config: RunConfig) -> tuple[Progress, int]:
    """What a process finds that starts right after a run went back."""
    run = start(replace(config, train=replace(config.train, steps=9)))
    spoil(run)
    assert begin(run)
    callbacks = default_callbacks(run)
    while run.progress.rollbacks == 0:
        metrics = step_metrics(run, train_step(run), 1.0)
        for callback in callbacks:
            callback.on_step(run, metrics)
    again = start(config)
    assert begin(again)
    run.sinks.close()
    again.sinks.close()
    return again.progress, again.reader.consumed


def test_a_restart_does_not_meet_the_spike_again(
    ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    for progress, consumed in ranks(2).run(restarted, config_of(tmp_path, prefix)):
        assert (progress.step, progress.rollbacks, consumed) == (6, 1, 36)


def test_no_rollback_is_left(ranks: Callable[[int], Pool], prefix: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, prefix, replace(SPIKE, rollbacks=0))
    ranks(1).run(trained, config)
    steps, texts = records(tmp_path)
    assert [record["train/step"] for record in steps] == [*range(1, 13)]
    (text,) = texts
    assert text.endswith("train.spike.rollbacks=0 are used up")


class Recorder(Rollback):
    """Keeps the steps at which it would go back."""

    def __init__(self, config: SpikeConfig) -> None:
        super().__init__(config, Checkpointer(CheckpointConfig()))
        self.found: list[int] = []

    def _go_back(self, run: Run, limit: float) -> None:
        self.found.append(run.progress.step)


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([3, 2.9, 3.1, 3, 9, 9], [6]),
        ([3, 2.9, 3.1, 3, 9, 3, 9, 3], []),
        ([3, 2.9, 9, 9], []),
        ([3, 2.9, 3.1, 3, math.nan, math.inf, 9, 3], []),
        ([3, 2.9, 3.1, 3, 9, 9, 9, 9], [6, 8]),
        ([3, 3, 3, 3, 3.001, 3.002], []),
        ([3, 3, 3, 3, 3.1, 3.1], [6]),
        ([9, 8, 7, 6, 5, 4, 3, 2], []),
    ],
    ids=["spike", "single", "window", "nan", "lasting", "flat", "flat-spike", "falling"],
)
def test_what_a_spike_is(losses: list[float], found: list[int]) -> None:
    recorder = Recorder(SPIKE)
    run: Any = type("run", (), {"progress": Progress()})()
    for step, loss in enumerate(losses, 1):
        run.progress.step = step
        recorder.on_step(run, {"train/loss": loss})
    assert recorder.found == found
