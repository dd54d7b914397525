"""Signals between steps: who is told, when all stop, and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_m1.config import CheckpointConfig, RunConfig
from megatron_m1.errors import EXIT_STOPPED, Stopped
from megatron_m1.observe.sinks import Metrics
from megatron_m1.pretrain import pretrain
from megatron_m1.training import stopping
from megatron_m1.training.beginning import begin
from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.callbacks.defaults import default_callbacks
from megatron_m1.training.loop import train
from megatron_m1.training.run import Run, build_run
from tests.distributed import Pool
from tests.training.small_run import small_config, write_data
from tests.training.test_resume import step_losses

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def config_of(folder: Path, prefix: str) -> RunConfig:
    # Nothing is saved but what the stop saves.
    config = small_config(str(folder), prefix, checkpoint=CheckpointConfig(save_at_end=False))
    return replace(config, train=replace(config.train, steps=6))


class Signal(Callback[Run]):
    """Signals one process during a step."""

    def __init__(self, rank: int, number: int, step: int) -> None:
        self.is_meant = int(os.environ["RANK"]) == rank
        self.number = number
        self.step = step

    def on_step(self, run: Run, metrics: Metrics) -> None:
        if self.is_meant and run.progress.step == self.step:
            os.kill(os.getpid(), self.number)


def stopped(config: RunConfig, rank: int, number: int, step: int) -> tuple[int, str]:
    """The step at which this process stops, and its words."""
    config.parallel.build_groups()
    before = {each: signal.getsignal(each) for each in stopping.SIGNALS}
    stopping.listen()
    run = build_run(config)
    assert begin(run)
    try:
        train(run, [*default_callbacks(run), Signal(rank, number, step)])
    except Stopped as error:
        return run.progress.step, str(error)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return -1, "trained to the end"


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_all_stop_after_the_step_in_which_one_was_told(
    number: signal.Signals, ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path / "run", prefix)
    for step, words in ranks(2).run(stopped, config, 1, number, 2):
        assert step == 2
        assert words.startswith(f"stopped by {number.name} after step 2 of 6: the checkpoint is in")
    ranks(2).run(whole_run, config)
    ranks(2).run(whole_run, config_of(tmp_path / "straight", prefix))
    assert step_losses(tmp_path / "run") == step_losses(tmp_path / "straight")


def whole_run(config: RunConfig) -> None:
    config.parallel.build_groups()
    pretrain(config)


def test_a_signal_in_the_last_step_changes_nothing(
    ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path / "run", prefix)
    results = ranks(2).run(stopped, config, 0, signal.SIGTERM, 6)
    assert results == [(-1, "trained to the end")] * 2


def test_a_signal_before_the_program_listens_waits_for_it(prefix: str, tmp_path: Path) -> None:
    """Blocked, as job scripts start it; sent before Python is even there."""
    program = [
        *(sys.executable, "-m", "megatron_m1.pretrain", "model=tiny", "data=indexed"),
        *("model.num_layers=2", "model.layer_pattern=LS", "model.vocab_size=64"),
        *(f"data.train=[{prefix}]", "logger=quiet", "train.seq_length=64"),
        *("train.report=false", "train.steps=500", f"run_dir={tmp_path}/run"),
    ]
    blocked = ["env", "--block-signal=USR1", "bash", "-c", 'kill -USR1 $$; exec "$@"', "pretrain"]
    done = subprocess.run(
        [*blocked, *program], cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert done.stderr.splitlines()[-1].startswith("stopped by SIGUSR1 after step 1 of 500: ")
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_000001"
