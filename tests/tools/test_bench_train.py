"""tools/bench_train.py as it is called from a shell in the root of the repository."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIZES = (
    "num_layers=2",
    "layer_pattern=LS",
    "hidden_size=32",
    "head_dim=16",
    "rotary_dim=16",
    "ffn_hidden_size=24",
    "vocab_size=128",
)


def test_both_sides_take_the_same_steps(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ["--seq-lengths", "96", "--threads", "1", "--steps", "2", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "tools/bench_train.py", *arguments, "--model", *SIZES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout and "lightning attention" in done.stdout

    report = json.loads(out.read_text())
    mine, hf = report["measurements"]
    assert (mine["side"], hf["side"]) == ("ours", "hf")
    assert mine["losses"] == pytest.approx(hf["losses"], rel=1e-4)
    assert mine["losses"][-1] < mine["losses"][0]
    for side in (mine, hf):
        assert len(side["step_seconds"]) == 2 and side["peak_bytes"] > side["library_bytes"] > 0
    assert {"experts", "softmax attention", "head and loss"} <= mine["pieces"].keys()
