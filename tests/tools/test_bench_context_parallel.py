"""tools/bench_context_parallel.py as it is called from a shell in the root of the repository."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_bytes_are_counted_and_match_the_formulas(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    sizes = ["--tokens", "256", "--heads", "2", "--groups", "1", "--width", "16", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, "tools/bench_context_parallel.py", *sizes, "--cp", "2", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "LASP-1" in done.stdout and "a giant of 50% among small" in done.stdout
    measured = json.loads(out.read_text())["measurements"]
    assert [one["layer"] for one in measured] == ["ring", "gather", "LASP+", "LASP-1"] * 2
    # Quarters 0 and 3 of the row on one rank, the halves between on the other.
    key, state = 2 * 16 * 4, 2 * 16 * 16 * 4
    sent = [(one["sent_forward"], one["sent_backward"]) for one in measured]
    assert sorted(one for one in sent[0::4]) == [
        (64 * key, (64 + 128) * key),
        (128 * key, (128 + 64) * key),
    ]
    assert sent[1] == (128 * key, 2 * 128 * key)
    assert sent[2] == sent[6] == (state, state)
    assert all(one["peak_bytes"] > 0 and len(one["seconds"]) == 1 for one in measured)
    # The table has the busiest rank of each layer at each number of ranks.
    printed = re.findall(r"^(\S+) +([12]) +([\d.]+) +([\d.]+) +[\d.]+$", done.stdout, re.M)
    assert [(layer, int(cp)) for layer, cp, *_ in printed] == [
        (layer, 2) for layer in ("ring", "gather", "LASP+", "LASP-1")
    ]
    for layer, _, mebibytes, peak in printed:
        ranks = [one for one in measured if one["layer"] == layer]
        most = max(one["sent_forward"] + one["sent_backward"] for one in ranks)
        assert mebibytes == f"{most / 2**20:.2f}"
        assert peak == f"{max(one['peak_bytes'] for one in ranks) / 2**20:.1f}"
