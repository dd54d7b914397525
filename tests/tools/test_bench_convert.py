"""tools/bench_convert.py as it is called from a shell in the root of the repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_way_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    done = subprocess.run(
        [sys.executable, "tools/bench_convert.py", "--folder", folder, "--model", "tiny"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+) .*MB/s  peak [\d.]+ GB", done.stdout, re.M) == [
        *("import", "export", "verify")
    ]
    assert not folder.exists()
