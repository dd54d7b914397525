"""tools/bench_convert.py on the smallest model, each conversion a process of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import bench_convert


def test_every_way_is_measured_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bench"
    bench_convert.main(["--folder", str(folder), "--model", "tiny"])
    found = re.findall(r"^(\w+) .*MB/s  peak ([\d.]+) GB", capsys.readouterr().out, re.M)
    assert [name for name, _ in found] == ["import", "export", "verify"]
    # Python with torch takes some hundred megabytes; the weights 9.
    assert all(0.1 < float(peak) < 2 for _, peak in found)
    assert not folder.exists()
