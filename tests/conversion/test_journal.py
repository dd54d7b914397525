"""What is left of a conversion that was killed, and who may go on with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron_m1.conversion.journal import JOURNAL, Journal, Record
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


def test_another_job_does_not_go_on(broken_off: Path) -> None:
    with pytest.raises(InputError, match="was begun from other weights or with other options"):
        Journal(broken_off, {"source": "elsewhere"})
