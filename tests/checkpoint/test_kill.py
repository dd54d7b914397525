"""A run that is killed at any point of a save goes on from the checkpoint before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.checkpoint import disk, folders, manifest, saving, store
from megatron_m1.checkpoint.choosing import chosen
from megatron_m1.checkpoint.disk import HashedFile
from megatron_m1.config import CheckpointConfig, RunConfig
from megatron_m1.pretrain import pretrain
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.checkpoint.spoil import names
from tests.distributed import Pool
from tests.training.small_run import small_config, start

ROOT = Path(__file__).resolve().parents[2]


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which does not come back from its last call."""
    left = calls

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        return function(*args, **kwargs) if left else die()

    return counting


# Where the second save is killed, and the step that is taken up after it.
POINTS: dict[str, tuple[Callable[[], None], int]] = {
    "before it writes": (lambda: setattr(saving.Staged, "write", die), 1),
    "in the middle of a file": (
        lambda: setattr(HashedFile, "write", after(200, HashedFile.write)),
        1,
    ),
    "before the description": (lambda: setattr(saving, "write_metadata", die), 1),
    "before the manifest": (lambda: setattr(manifest, "as_bytes", die), 1),
    "before the new name": (lambda: setattr(folders, "publish", die), 1),
    "before latest": (lambda: setattr(folders, "replace_file", die), 1),
    "while latest is moved": (lambda: setattr(disk.os, "replace", die), 1),
    "before the old one goes": (lambda: setattr(saving.retention, "set_aside", die), 2),
    "while the old one goes": (lambda: setattr(folders.shutil, "rmtree", die), 2),
}


def killed(config: RunConfig, point: str) -> None:
    run = start(config)
    train_step(run)
    store.save(run)
    train_step(run)
    POINTS[point][0]()
    store.save(run)


def taken_up(config: RunConfig) -> tuple[str, int, set[str]]:
    """What the next process finds, and what is there after its first save."""
    run = start(config)
    with chosen(None, run.checkpoint_dir, "full") as path:
        assert path is not None
        store.load(run, path)
    train_step(run)
    store.save(run)
    return path.name, run.progress.step, names(run.checkpoint_dir)


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_save_leaves_the_one_before(
    point: str, single_process: Layout, prefix: str, tmp_path: Path
) -> None:
    config = small_config(str(tmp_path), prefix)
    config = replace(config, checkpoint=CheckpointConfig(keep=1))
    with pytest.raises(AssertionError, match="rank 0 died"):
        Pool(1).run(killed, config, point)
    step = POINTS[point][1]
    expected = f"step_{step:06d}", step + 1, {f"step_{step + 1:06d}", "latest"}
    assert taken_up(config) == expected


def saved_anew(config: RunConfig) -> None:
    """A save of a step that there is already, killed between its two moves."""
    run = start(config)
    train_step(run)
    store.save(run)
    Path.rename = after(2, Path.rename)  # type: ignore[method-assign]
    store.save(run)


def test_a_step_that_is_saved_again_is_never_missing(
    single_process: Layout, prefix: str, tmp_path: Path
) -> None:
    config = small_config(str(tmp_path), prefix)
    with pytest.raises(AssertionError, match="rank 0 died"):
        Pool(1).run(saved_anew, config)
    assert names(tmp_path / "checkpoints") == {"step_000001.old", "step_000001.tmp", "latest"}
    name, step, after_save = taken_up(config)
    assert (name, step) == ("step_000001.old", 2)
    assert after_save == {"step_000001", "step_000002", "latest"}


def one_dies(config: RunConfig) -> None:
    run = start(config)
    train_step(run)
    store.save(run)
    train_step(run)
    if os.environ["RANK"] == "1":
        saving.Staged.write = die  # type: ignore[method-assign]
    store.save(run)


def test_one_of_several_processes_dies(
    ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    config = small_config(str(tmp_path), prefix, parallel=Layout(tp=2))
    started = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 died"):
        Pool(2).run(one_dies, config)
    assert time.monotonic() - started < 60, "the other one waited for it"
    assert ranks(2).run(taken_up, config)[0][:2] == ("step_000001", 2)


def test_a_program_that_is_killed_from_outside_goes_on(
    single_process: Layout, prefix: str, tmp_path: Path
) -> None:
    program = subprocess.Popen(
        [sys.executable, __file__, prefix, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    folder = tmp_path / "checkpoints"
    try:
        while not list(folder.glob("step_00000[3-9].tmp/__0_0.distcp")):
            assert program.poll() is None
            time.sleep(0.001)
    finally:
        os.killpg(program.pid, signal.SIGKILL)
    program.wait()
    latest = folders.step_of(folder / (folder / "latest").read_text())
    run = pretrain(outside_config(prefix, tmp_path, steps=latest + 2))
    assert run.progress.step == latest + 2
    assert f"step_{latest + 2:06d}" in names(folder)
    assert not [name for name in names(folder) if name.endswith(".tmp")]


def outside_config(prefix: str, folder: Path, steps: int) -> RunConfig:
    config = small_config(str(folder), prefix)
    return replace(
        config,
        train=replace(config.train, steps=steps),
        checkpoint=CheckpointConfig(every=1),
    )


if __name__ == "__main__":
    from parallel import host

    host.enable()
    from megatron_m1.runtime import processes

    with processes(Layout()):
        pretrain(outside_config(sys.argv[1], Path(sys.argv[2]), steps=1000))
