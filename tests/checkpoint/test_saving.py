"""Saving while training goes on, and what happens when the disk does not take it."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_m1.checkpoint import disk, lease, saving, store
from megatron_m1.checkpoint.disk import HashedFile
from megatron_m1.checkpoint.saving import Save
from megatron_m1.checkpoint.writing import Staged
from megatron_m1.config import CheckpointConfig, RunConfig
from megatron_m1.errors import EXIT_STORAGE, NotFinite, StorageError
from megatron_m1.pretrain import pretrain
from megatron_m1.training import loop
from megatron_m1.training.callbacks.checkpointer import Checkpointer
from megatron_m1.training.run import Run
from megatron_m1.training.step import StepResult, train_step
from parallel.layout import Layout
from tests.checkpoint.spoil import names
from tests.distributed import Pool
from tests.training.small_run import small_config, start, weight_parts


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before it is set."""
    opened, write = threading.Event(), Staged.write

    def waiting(*args: Any) -> Any:
        assert opened.wait(60)
        return write(*args)

    monkeypatch.setattr(Staged, "write", waiting)
    yield opened
    opened.set()


def test_the_manifest_describes_every_file(checkpoint: Path) -> None:
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert set(listed) == names(checkpoint) - {"manifest.json"}
    for name, entry in listed.items():
        data = (checkpoint / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_everything_is_flushed_before_it_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    sync, rename = os.fsync, Path.rename

    def syncing(handle: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def renaming(path: Path, target: Path) -> Path:
        seen.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    train_step(run)
    path = store.save(run)
    flushed, named = seen[: seen.index("rename")], seen[seen.index("rename") + 1 :]
    assert set(flushed) == {*names(path), "step_000002.tmp"}
    assert flushed[-2:] == ["manifest.json", "step_000002.tmp"]
    assert named == ["checkpoints", ".latest.tmp", "checkpoints"]


def test_training_goes_on_while_it_is_written(run: Run, gate: threading.Event) -> None:
    train_step(run)
    at_save = weight_parts(run)
    save = Save(run)
    train_step(run)
    assert not save.is_written()
    assert (run.checkpoint_dir / "latest").read_text() == "step_000001"
    gate.set()
    path = save.finish()
    assert (run.checkpoint_dir / "latest").read_text() == path.name == "step_000002"
    resumed = start(run.config)
    store.load(resumed, path)
    assert resumed.progress.step == 2
    for name, (_, _, weight) in weight_parts(resumed).items():
        torch.testing.assert_close(weight, at_save[name][2], rtol=0, atol=0)
        assert not torch.equal(weight, weight_parts(run)[name][2])


def test_a_disk_that_fills_up_is_told_and_leaves_the_last_whole_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save hides the disk's error behind one of its own."""
    train_step(run)
    with monkeypatch.context() as patched:
        written = HashedFile.write

        def write(self: HashedFile, data: bytes) -> int:
            if self.tell() > 10_000:
                try:
                    full_disk()
                except OSError as error:
                    self.failure = error
                    raise
            return written(self, data)

        patched.setattr(HashedFile, "write", write)
        with pytest.raises(StorageError, match="step_000002 cannot be written to .*: the disk is"):
            store.save(run)
    assert names(run.checkpoint_dir) == {"step_000001", "latest"}
    assert (run.checkpoint_dir / "latest").read_text() == "step_000001"
    store.save(run)
    assert names(run.checkpoint_dir) == {"step_000001", "step_000002", "latest"}


def test_too_little_space_is_told_before_writing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step(run)
    monkeypatch.setattr(disk, "_free", lambda folder: 1_500_000)
    monkeypatch.setattr(Staged, "write", full_disk)
    with pytest.raises(StorageError) as refused:
        store.save(run)
    said = re.fullmatch(
        f"step_000002 cannot be written to {run.checkpoint_dir}: the disk is full: it needs "
        r"(.+) MB, 1.5 MB are free",
        str(refused.value),
    )
    written = sum(file.stat().st_size for file in run.checkpoint_dir.glob("*/*.distcp"))
    assert said and written / 1e6 <= float(said[1]) < 1.05 * written / 1e6
    assert names(run.checkpoint_dir) == {"step_000001", "latest"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(
    run: Run, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = replace(run.config.checkpoint, dir=str(small_disk))
    run = replace(run, config=replace(run.config, checkpoint=checkpoint))
    with pytest.raises(StorageError, match=r"disk is full: it needs 2\.\d+ MB, 1.05 MB are free"):
        store.save(run)
    monkeypatch.setattr(saving, "require_space", lambda *args: None)
    with pytest.raises(StorageError, match=r"disk is full: it needs 2\.\d+ MB, 0 bytes are free"):
        store.save(run)
    assert names(small_disk) == set()


def limited(config: RunConfig) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    run = start(config)
    train_step(run)
    try:
        store.save(run)
    except StorageError as error:
        return str(error)
    return "saved"


def test_a_limit_of_file_sizes_is_told(prefix: str, tmp_path: Path) -> None:
    pool = Pool(1)
    (said,) = pool.run(limited, small_config(str(tmp_path), prefix))
    pool.close()
    assert said.endswith("File too large: a file may not grow so large here (see ulimit -f)")
    assert names(tmp_path / "checkpoints") == set()


def failing_on(config: RunConfig, rank: int) -> str:
    """A save that fails on one process, while it writes or (on the first) while it completes."""
    run = start(config)
    train_step(run)
    original = saving.write_metadata
    if dist.get_rank() == rank:
        Staged.write, write = full_disk, Staged.write  # type: ignore[method-assign,assignment]
    elif rank < 0:
        saving.write_metadata = full_disk  # type: ignore[assignment]
    try:
        store.save(run)
    except StorageError as error:
        return str(error)
    finally:
        saving.write_metadata = original
        if dist.get_rank() == rank:
            Staged.write = write  # type: ignore[method-assign]
    return "saved"


def test_what_fails_on_one_process_is_told_by_all(
    ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    config = small_config(str(tmp_path), prefix, parallel=Layout(tp=2))
    for rank in (0, 1, -1):
        first, second = ranks(2).run(failing_on, config, rank)
        assert first == second
        assert "step_000001 cannot be written to" in first and "the disk is full" in first
        assert names(tmp_path / "checkpoints") == set()
    assert ranks(2).run(failing_on, config, 2) == ["saved", "saved"]


class Texts:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str, str]] = []

    def text(self, step: int, name: str, text: str) -> None:
        self.found.append((step, name, text))


def callback(run: Run, **settings: Any) -> tuple[Checkpointer, Run, Texts]:
    checkpoint = CheckpointConfig(**{"every": 1, "save_at_end": True, **settings})
    run = replace(run, config=replace(run.config, checkpoint=checkpoint))
    run.sinks = texts = Texts()  # type: ignore[assignment]
    return Checkpointer(checkpoint), run, texts


def test_a_save_counts_at_the_first_step_after_it_is_written(
    run: Run, gate: threading.Event
) -> None:
    checkpointer, run, texts = callback(run, every=2)
    for step in (2, 3):
        run.progress.step = step
        metrics: dict[str, float] = {}
        checkpointer.on_step(run, metrics)
        assert ("time/save" in metrics) == (step == 2)
    assert texts.found == []
    gate.set()
    assert checkpointer._on_its_way is not None
    checkpointer._on_its_way._written.result(60)
    run.progress.step = 3
    checkpointer.on_step(run, metrics)
    assert texts.found == [(3, "checkpoint", str(run.checkpoint_dir / "step_000002"))]
    assert "time/save" in metrics
    run.progress.step = 4
    checkpointer.on_step(run, metrics)
    checkpointer.on_end(run)
    assert [Path(path).name for _, _, path in texts.found] == ["step_000002", "step_000004"]
    assert (run.checkpoint_dir / "latest").read_text() == "step_000004"


def test_saving_can_wait(run: Run) -> None:
    checkpointer, run, texts = callback(run, async_save=False)
    run.progress.step = 2
    checkpointer.on_step(run, {})
    assert (run.checkpoint_dir / "latest").read_text() == "step_000002"
    checkpointer.on_end(run)
    assert len(texts.found) == 1


def test_a_failed_save_ends_training_or_not(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Staged, "write", full_disk)
        stopping, run, _ = callback(run, async_save=False)
        run.progress.step = 2
        with pytest.raises(StorageError, match="the disk is full") as stopped:
            stopping.on_step(run, {})
        assert stopped.value.exit_code == EXIT_STORAGE == 73

        going_on, run, texts = callback(run, on_error="continue", every=2)
        going_on.on_step(run, {})
        run.progress.step = 4
        going_on.on_step(run, {})
        ((step, name, text),) = texts.found
        assert (step, name) == (4, "checkpoint_failed") and "step_000002 cannot" in text
        assert capsys.readouterr().err.endswith("; training goes on\n")
    run.progress.step = 6
    going_on.on_step(run, {})
    assert "step_000004 cannot be written" in texts.found[1][2]
    going_on.on_end(run)
    assert Path(texts.found[2][2]).name == "step_000006"

    run.progress.step = 7
    monkeypatch.setattr(Staged, "write", full_disk)
    with pytest.raises(StorageError, match="step_000007 cannot be written"):
        going_on.on_end(run)
    assert (run.checkpoint_dir / "latest").read_text() == "step_000006"


def test_a_save_that_takes_long_shows_that_it_lives(run: Run, gate: threading.Event) -> None:
    saving = Save(run)
    beats = run.sections.beats
    threading.Timer(0.5, gate.set).start()
    saving.finish()
    assert run.sections.beats > beats + 5


def test_a_loss_that_is_no_number_does_not_lose_the_save_on_its_way(
    single_process: Layout, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(str(tmp_path), prefix)
    config = replace(config, checkpoint=CheckpointConfig(every=2))
    config = replace(config, train=replace(config.train, max_skipped=0))

    def third_is_nan(run: Run) -> StepResult:
        result = train_step(run)
        if run.progress.step < 3:
            return result
        run.progress.count(is_finite=False)
        return replace(result, loss=math.nan, is_finite=False)

    monkeypatch.setattr(loop, "train_step", third_is_nan)
    with pytest.raises(NotFinite, match="step 3"):
        pretrain(config)
    assert names(tmp_path / "checkpoints") == {"step_000002", "latest"}


def test_a_checkpoint_in_use_is_not_replaced(run: Run, checkpoint: Path) -> None:
    with lease.reading(checkpoint):
        with pytest.raises(StorageError, match="step_000001 is being read by another program"):
            store.save(run)
        assert names(run.checkpoint_dir) == {"step_000001", "latest"}
    store.save(run)


def test_what_killed_saves_left_is_removed(run: Run) -> None:
    folder = run.checkpoint_dir
    for name in ("step_000009.tmp", "step_000001.old", ".step_000000.1234.deleted"):
        (folder / name).mkdir()
        (folder / name / "config.json").touch()
    train_step(run)
    store.save(run)
    assert names(folder) == {"step_000001", "step_000002", "latest"}
