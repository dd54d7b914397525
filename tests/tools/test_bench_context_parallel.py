"""tools/bench_context_parallel.py as it is called from a shell in the root of the repository."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


SIZES = ["--tokens", "256", "--heads", "2", "--groups", "1", "--width", "16", "--steps", "1"]
LAYERS = ["ring", "gather", "LASP+", "LASP-1"]


def bench(out: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """What it prints, and its measurements."""
    done = subprocess.run(
        [sys.executable, "tools/bench_context_parallel.py", *SIZES, *arguments, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())["measurements"]


def test_bytes_are_counted_and_match_the_formulas(tmp_path: Path) -> None:
    printed, measured = bench(tmp_path / "bench.json", "--cp", "2")
    assert "a giant of 50% among small" in printed
    assert [one["layer"] for one in measured] == LAYERS * 2
    # Quarters 0 and 3 of the row on one rank, the halves between on the other.
    key, state = 2 * 16 * 4, 2 * 16 * 16 * 4
    sent = [(one["sent_forward"], one["sent_backward"]) for one in measured]
    assert sorted(one for one in sent[0::4]) == [
        (64 * key, (64 + 128) * key),
        (128 * key, (128 + 64) * key),
    ]
    assert sent[1] == (128 * key, 2 * 128 * key)
    assert sent[2] == sent[6] == (state, state)
    # Queries, keys, values and output of half the row, and two numbers of each softmax.
    assert {one["kept_bytes"] for one in measured[0::4]} == {4 * 128 * (6 * 16 + 2)}
    for one in measured:
        assert one["peak_bytes"] > one["kept_bytes"] and one["process_bytes"] > 0
        assert len(one["seconds"]) == len(one["cpu_seconds"]) == 1
    # The table has the busiest rank of each layer at each number of ranks.
    number = r" +([\d.]+)"
    lines = re.findall(rf"^(\S+) +balanced +2{number * 7}$", printed, re.M)
    assert [layer for layer, *_ in lines] == LAYERS
    for layer, work, mebibytes, kept, peak, *_ in lines:
        ranks = [one for one in measured if one["layer"] == layer]
        most = max(one["sent_forward"] + one["sent_backward"] for one in ranks)
        assert (mebibytes, work) == (f"{most / 2**20:.2f}", "1.000")
        assert kept == f"{max(one['kept_bytes'] for one in ranks) / 2**20:.1f}"
        assert peak == f"{max(one['peak_bytes'] for one in ranks) / 2**20:.1f}"


def test_skewed_rows_show_what_each_cut_makes_of_them(tmp_path: Path) -> None:
    arguments = ["--row", "skewed", "--cp", "2", "--cut", "balanced", "contiguous"]
    _, measured = bench(tmp_path / "bench.json", *arguments)
    work = {(one["layer"], one["cut"]): one["imbalance"] for one in measured}
    assert list(work) == [(layer, cut) for cut in ("balanced", "contiguous") for layer in LAYERS]
    assert work["ring", "balanced"] < 1.02 < 1.2 < work["ring", "contiguous"]
    assert work["LASP+", "contiguous"] == 1
