"""Faults that are made on purpose: how they are asked for, and that each is made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_m1.config import CheckpointConfig, RunConfig
from megatron_m1.errors import InputError, StorageError
from megatron_m1.training.beginning import begin
from megatron_m1.training.callbacks.defaults import default_callbacks
from megatron_m1.training.faults.making import MAKERS, Injected
from megatron_m1.training.faults.plan import KINDS, Fault, fault_problems, parse
from megatron_m1.training.loop import train
from tests.distributed import Pool
from tests.training.small_run import small_config, start, write_data


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def test_a_fault_is_kind_step_and_rank() -> None:
    assert parse("sigkill@5:1") == Fault("sigkill", 5, 1)
    assert parse("sigkill@5") == Fault("sigkill", 5, 0)
    assert str(parse("hang@70:12")) == "hang@70:12"


@pytest.mark.parametrize(
    ("texts", "seconds", "problem"),
    [
        (["sigkill"], 9, "fault=sigkill is not of the form KIND@STEP:RANK"),
        (["sigkill@5:"], 9, "fault=sigkill@5: is not of the form KIND@STEP:RANK"),
        (["oom@5"], 9, "fault=oom@5: oom is not one of sigkill, sigstop,"),
        (["slow@0"], 9, "fault=slow@0: steps count from 1"),
        (["slow@5:2"], 9, "fault=slow@5:2: there are 2 processes, from 0 on"),
        (["slow@5", "slow@5:0"], 9, "fault=slow@5:0 is given twice"),
        (["hang@5"], 0, "fault=hang@5 hangs for ever without train.watchdog_seconds"),
    ],
)
def test_what_cannot_be_made_is_told(texts: list[str], seconds: float, problem: str) -> None:
    (found,) = fault_problems(texts, 2, seconds)
    assert found.startswith(problem)


def test_every_kind_can_be_made() -> None:
    assert sorted(MAKERS) == sorted(KINDS)
    assert fault_problems([f"{kind}@5:1" for kind in KINDS], 2, 9.0) == []


def attempt(config: RunConfig) -> tuple[int, str]:
    """The steps that are reached, and the error that ends it on this process."""
    run = start(config)
    assert begin(run)
    try:
        train(run, default_callbacks(run))
    except (Injected, InputError, StorageError) as error:
        return run.progress.step, f"{type(error).__name__}: {error}"
    finally:
        run.sinks.close()
    return run.progress.step, ""


@pytest.mark.parametrize(
    ("kind", "step", "words"),
    [
        ("exception", 3, "Injected: a fault that was asked for"),
        ("read_error", 3, "InputError: rows 12 to 15 cannot be read: [Errno 5] Input/output error"),
        ("disk_full", 4, "StorageError: step_000004 cannot be written to "),
    ],
)
def test_it_is_made_once_and_the_run_then_ends(
    kind: str, step: int, words: str, ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    config = small_config(str(tmp_path), prefix, fault=[f"{kind}@4"])
    config = replace(config, checkpoint=CheckpointConfig(every=2, async_save=False))
    ((reached, error),) = ranks(1).run(attempt, config)
    assert reached == step
    assert error.startswith(words)
    assert os.listdir(tmp_path / "faults") == [f"{kind}@4:0"]
    assert ranks(1).run(attempt, config) == [(5, "")]


def test_a_damaged_checkpoint_waits_until_there_is_one_before(
    ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    config = small_config(str(tmp_path), prefix, fault=["truncate@2"])
    config = replace(config, checkpoint=CheckpointConfig(every=2, async_save=False))
    with pytest.raises(AssertionError, match="rank 0 died"):
        Pool(1).run(attempt, config)
    # Both are there, and the run goes on from the first.
    assert (tmp_path / "checkpoints/latest").read_text() == "step_000004"
    assert ranks(1).run(resumed_from, config) == [2]
    assert ranks(1).run(attempt, config) == [(5, "")]


def resumed_from(config: RunConfig) -> int:
    run = start(config)
    begin(run)
    run.sinks.close()
    return run.progress.step
