"""tools/bench_long_sequence.py as it is called from a shell in the root of the repository."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_a_step_over_two_processes_is_measured_and_compared(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ["--tokens", "255", "--cp", "2", "--compare-at", "255", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "tools/bench_long_sequence.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (both,) = re.findall(r"losses at 255 tokens: cp=1 (\[.*\]), cp=2 (\[.*\])", done.stdout)
    one, several = map(json.loads, both)
    assert one == pytest.approx(several, rel=1e-5) and len(one) == 2

    header, row = done.stdout.splitlines()[-2:]
    assert header.split()[:3] == ["tokens", "cp", "seconds"] and header.endswith("loss")
    tokens, cp, seconds, *peaks, loss = map(float, row.split())
    assert (tokens, cp, len(peaks)) == (255, 2, 2) and seconds > 0 and min(peaks) > 100
    ranks = json.loads(out.read_text())
    assert [rank["losses"] for rank in ranks] == [[pytest.approx(loss, abs=1e-5)]] * 2
    assert [round(rank["peak_bytes"] / 2**20) for rank in ranks] == peaks
