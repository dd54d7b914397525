"""A run with a checkpoint after its first step, and copies of it to spoil."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_m1.checkpoint import store
from megatron_m1.config import RunConfig
from megatron_m1.training.run import Run
from megatron_m1.training.state import Progress
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.training.small_run import small_config, start, write_data


@pytest.fixture(scope="package")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="package")
def trained(tmp_path_factory: pytest.TempPathFactory, prefix: str, single_process: Layout) -> Run:
    """A run with a checkpoint after its first step."""
    run = start(small_config(str(tmp_path_factory.mktemp("runs") / "run"), prefix))
    train_step(run)
    store.save(run)
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """The same with a folder of its own."""
    shutil.copytree(trained.dir, tmp_path / "run")
    progress = Progress(step=1, tokens=trained.progress.tokens)
    return replace(
        trained, config=replace(trained.config, run_dir=str(tmp_path / "run")), progress=progress
    )


@pytest.fixture
def config(run: Run) -> RunConfig:
    return run.config


@pytest.fixture
def checkpoint(run: Run) -> Path:
    """Its checkpoint."""
    return run.checkpoint_dir / "step_000001"
