"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_m1.files import whole


def test_a_file_takes_its_name_at_the_end(tmp_path: Path) -> None:
    with whole(tmp_path / "a.txt") as partial:
        partial.write_text("new")
        assert partial.suffix == ".txt"
        assert not (tmp_path / "a.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OSError, match="disk"), whole(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
