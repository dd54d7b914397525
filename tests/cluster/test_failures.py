"""The tracebacks of a job and the one that began it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_m1.cluster import failures
from megatron_m1.errors import InputError, Stopped

Record = Callable[[int, BaseException], None]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Record an error as a rank that raised it."""
    monkeypatch.setenv(failures.FOLDER_VARIABLE, str(tmp_path))

    def of(rank: int, error: BaseException) -> None:
        monkeypatch.setenv("RANK", str(rank))
        try:
            raise error
        except BaseException as raised:
            failures.record(raised)

    return of


def test_the_first_failure_is_shown_whole(record: Record, tmp_path: Path) -> None:
    record(3, IndexError("index out of range"))
    for rank in (0, 1, 2, 4, 5, 6, 7):
        record(rank, RuntimeError("Connection closed by peer\nand more"))
    lines = failures.summary(tmp_path).splitlines()
    assert lines[0].startswith("rank 3 on ") and "failed first: IndexError: index out" in lines[0]
    assert lines[1] == "Traceback (most recent call last):"
    others = [line for line in lines if "RuntimeError: Connection closed by peer" in line]
    assert len(others) == 5 and all("and more" not in line for line in others)
    assert lines[-1] == f"and 2 more in {tmp_path}"


def test_what_was_killed_began_it_though_others_spoke_before(
    record: Record, tmp_path: Path
) -> None:
    record(0, RuntimeError("Connection closed by peer"))
    failures.keep(1, "ended by SIGKILL")
    assert "rank 1 on " in failures.summary(tmp_path).splitlines()[0]
    assert "ended by SIGKILL" in failures.summary(tmp_path).splitlines()[0]


def test_the_first_words_of_a_rank_stay(record: Record, tmp_path: Path) -> None:
    record(0, InputError("data/a.idx is missing"))
    record(0, RuntimeError("while groups were left"))
    failures.keep(0, "ended by SIGKILL")
    (found,) = failures.read(tmp_path)
    assert found.error == "InputError: data/a.idx is missing"


def test_a_stop_is_no_failure(record: Record, tmp_path: Path) -> None:
    record(0, Stopped("stopped"))
    record(0, SystemExit(75))
    assert list(tmp_path.iterdir()) == []
    assert failures.summary(tmp_path).startswith("no process left a traceback")


def test_nothing_is_written_outside_of_jobs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(failures.FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    failures.record(RuntimeError("a"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(failures.FOLDER_VARIABLE, str(tmp_path / "file" / "folder"))
    failures.record(RuntimeError("a"))
    assert "rank_00000.json cannot be written" in capsys.readouterr().err


def test_a_file_is_json(record: Record, tmp_path: Path) -> None:
    record(2, KeyError("a"))
    found = json.loads((tmp_path / "rank_00002.json").read_text())
    assert set(found) == {"rank", "host", "error", "details", "seconds"}
