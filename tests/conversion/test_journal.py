"""What is left of a conversion that was killed, and who may go on with it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path

import pytest

from megatron_m1.conversion import progress
from megatron_m1.conversion.journal import JOURNAL, Journal, Record, refuse_unfinished
from megatron_m1.errors import InputError

JOB = {"source": "here"}


def finished(folder: Path, name: str) -> Record:
    (folder / name).write_bytes(name.encode())
    return Record(name, len(name), hashlib.sha256(name.encode()).hexdigest(), [])


@pytest.fixture
def broken_off(tmp_path: Path) -> Path:
    """Where a job with two finished files was to write."""
    journal = Journal(tmp_path / "out", JOB)
    for name in ("one", "two"):
        journal.add(finished(journal.folder, name))
    journal.close()
    return tmp_path / "out"


def test_finished_files_are_known_again(broken_off: Path) -> None:
    journal = Journal(broken_off, JOB)
    assert journal.records.keys() == {"one", "two"}
    journal.publish()
    assert {path.name for path in broken_off.iterdir()} == {"one", "two"}


def test_half_a_line_is_forgotten(broken_off: Path) -> None:
    path = broken_off.with_name("out.partial") / JOURNAL
    path.write_bytes(path.read_bytes()[:-20])
    journal = Journal(broken_off, JOB)
    assert journal.records.keys() == {"one"}
    journal.add(finished(journal.folder, "two"))
    journal.close()
    assert [json.loads(line).get("file") for line in path.read_text().splitlines()] == [
        *(None, "one", "two")
    ]


@pytest.mark.parametrize("change", [b"one more", b"eno", None])
def test_a_file_that_changed_is_written_again(change: bytes | None, broken_off: Path) -> None:
    file = broken_off.with_name("out.partial") / "one"
    file.unlink() if change is None else file.write_bytes(change)
    assert Journal(broken_off, JOB).records.keys() == {"two"}


def test_one_process_at_a_time(broken_off: Path) -> None:
    journal = Journal(broken_off, JOB)
    with pytest.raises(InputError, match="out.partial is being written by another process"):
        Journal(broken_off, JOB)
    journal.close()
    Journal(broken_off, JOB)


def test_killed_just_before_its_end_it_goes_on(broken_off: Path) -> None:
    """The folder has its name, and still its journal, which readers take for unfinished."""
    broken_off.with_name("out.partial").rename(broken_off)
    with pytest.raises(InputError, match="the same command goes on with it"):
        refuse_unfinished(broken_off)
    journal = Journal(broken_off, JOB)
    assert journal.records.keys() == {"one", "two"}
    journal.publish()
    refuse_unfinished(broken_off)


def test_a_place_that_a_folder_cannot_take_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with pytest.raises(InputError, match="out is a link or a mount point"):
        Journal(tmp_path / "out", JOB)


def test_checking_what_is_there_shows_how_far_it_is(
    broken_off: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    Journal(broken_off, JOB).close()
    assert capsys.readouterr().err.count("checking what is there: ") == 2


def test_a_disk_without_locks_is_written_to(
    broken_off: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert Journal(broken_off, JOB).records.keys() == {"one", "two"}


def test_another_job_does_not_go_on(broken_off: Path) -> None:
    with pytest.raises(InputError, match="was begun from other weights or with other options"):
        Journal(broken_off, {"source": "elsewhere"})
