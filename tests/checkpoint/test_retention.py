"""Which checkpoints stay, and which never go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_m1.checkpoint import folders, lease, retention
from megatron_m1.errors import InputError
from tests.checkpoint.spoil import names

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from megatron_m1.checkpoint import lease
with lease.reading(Path(sys.argv[1])):
    print("reading", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 10, 20, ... 60, of which 60 is the latest."""
    for step in range(10, 70, 10):
        path = folders.step_folder(tmp_path, step)
        path.mkdir()
        (path / folders.CONFIG).write_text("{}")
    (tmp_path / folders.LATEST).write_text("step_000060")
    return tmp_path


@pytest.fixture
def reader(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that reads step 10."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / "step_000010")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "reading\n"
    yield process
    process.kill()
    process.wait()


def going(folder: Path, keep: int | None, keep_every: int | None = None, newest: int = 60) -> list:
    found = retention.surplus(folders.step_folder(folder, newest), keep, keep_every)
    return sorted(folders.step_of(path) for path in found)


def test_the_newest_stay(folder: Path) -> None:
    assert going(folder, keep=2) == [10, 20, 30, 40]
    assert going(folder, keep=1) == [10, 20, 30, 40, 50]
    assert going(folder, keep=6) == []


def test_all_stay_unless_told_otherwise(folder: Path) -> None:
    assert going(folder, keep=None) == []
    assert going(folder, keep=None, keep_every=30) == []


def test_every_so_many_steps_one_stays(folder: Path) -> None:
    assert going(folder, keep=2, keep_every=20) == [10, 30]
    assert going(folder, keep=2, keep_every=7) == [10, 20, 30, 40]


def test_a_run_that_was_taken_back_leaves_the_later_ones(folder: Path) -> None:
    assert going(folder, keep=2, newest=40) == [10, 20]


def test_what_is_not_whole_is_not_counted(folder: Path) -> None:
    (folder / "step_000050" / folders.CONFIG).unlink()
    assert going(folder, keep=2) == [10, 20, 30]


def test_what_is_read_stays(folder: Path, reader: subprocess.Popen[str]) -> None:
    surplus = retention.surplus(folder / "step_000060", keep=4, keep_every=None)
    aside = retention.set_aside(surplus)
    assert [path.name.split(".")[1] for path in aside] == ["step_000020"]
    folders.remove(aside)
    expected = {"latest", *(f"step_0000{step}" for step in (10, 30, 40, 50, 60))}
    assert names(folder) == expected
    # However a reader ends, its lease ends with it.
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    folders.remove(retention.set_aside(surplus))
    assert names(folder) == expected - {"step_000010"}


def test_several_may_read(folder: Path, reader: subprocess.Popen[str]) -> None:
    with lease.reading(folder / "step_000010"):
        assert lease.is_read(folder / "step_000010")
    assert not lease.is_read(folder / "step_000020")


def test_a_reader_that_comes_too_late_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint goes while the reader has its file open and waits for the lock."""
    lock = lease._lock

    def gone_before(handle: int, kind: int) -> bool:
        folders.set_aside(folder / "step_000010")
        return lock(handle, kind)

    monkeypatch.setattr(lease, "_lock", gone_before)
    with (
        pytest.raises(InputError, match="step_000010 was removed just now"),
        lease.reading(folder / "step_000010"),
    ):
        pass
    with (
        pytest.raises(InputError, match="step_000010 cannot be read: No such file"),
        lease.reading(folder / "step_000010"),
    ):
        pass


def test_without_locks_nothing_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(handle: int, kind: int) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(lease.fcntl, "flock", unknown)
    assert retention.set_aside([folder / "step_000010"]) == []
    with lease.reading(folder / "step_000010"):
        pass
    assert not lease.is_read(folder / "step_000010")


def test_what_goes_is_no_checkpoint_any_more(folder: Path) -> None:
    (aside,) = retention.set_aside([folder / "step_000050"])
    assert [folders.step_of(path) for path in folders.from_latest(folder)] == [60, 40, 30, 20, 10]
    with pytest.raises(InputError, match="holds no checkpoint"):
        folders.given_by(str(folder / "step_000050"))
    assert aside.exists()
    folders.clear_leftovers(folder)
    assert not aside.exists()


def test_a_replaced_checkpoint_gets_its_name_back(folder: Path) -> None:
    (folder / "step_000060").rename(folder / "step_000060.old")
    folders.clear_leftovers(folder)
    assert "step_000060" in names(folder) and "step_000060.old" not in names(folder)
