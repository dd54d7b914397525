"""Every kind of fault once, and the drill's own judgement."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.training.faults.plan import KINDS
from tests.checkpoint.spoil import flip_bit
from tools import soak

ROOT = Path(__file__).resolve().parents[2]
RESTARTS = 10


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A drill with each kind once, and what it wrote."""
    out = tmp_path_factory.mktemp("soak") / "out"
    done = subprocess.run(
        [
            *(sys.executable, "tools/soak.py", "--faults", str(len(KINDS)), "--gap", "6"),
            *("--seed", "3", "--out", str(out)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, json.loads((out / "soak.json").read_text())


def test_a_run_survives_every_kind_of_fault(drilled: tuple[Path, dict[str, Any]]) -> None:
    _, verdict = drilled
    assert sorted(outcome["fault"]["kind"] for outcome in verdict["outcomes"]) == sorted(KINDS)
    assert all(outcome["is_made"] for outcome in verdict["outcomes"])
    assert all(outcome["seconds"] is not None for outcome in verdict["outcomes"])
    assert verdict["problems"] == []
    # A machine under load may let the watchdog bite once more.
    assert verdict["attempts"] > RESTARTS
    assert {int(code) for code in verdict["codes"]} == {0, 1, 73, 74, 75, 76}


@pytest.fixture
def spoiled(drilled: tuple[Path, dict[str, Any]], tmp_path: Path) -> tuple[Path, Path, int]:
    """A copy of the run, the one without faults, and their steps."""
    out, verdict = drilled
    shutil.copytree(out / "run", tmp_path / "run")
    return tmp_path / "run", out / "reference", verdict["steps"]


def test_the_drill_sees_what_differs(spoiled: tuple[Path, Path, int]) -> None:
    run, reference, steps = spoiled
    assert soak.differences(run, reference, steps) == []
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    place = next(index for index, line in enumerate(lines) if '"step": 12, "train' in line)

    metrics.write_text("".join(lines[:place] + lines[place + 1 :]))
    assert soak.differences(run, reference, steps)[0].startswith("the records are not those")

    record = json.loads(lines[place])
    record["train/loss"] += 1e-12
    lines[place] = json.dumps(record) + "\n"
    metrics.write_text("".join(lines))
    assert soak.differences(run, reference, steps)[0].startswith("step 12: {'step': 12")


def test_the_drill_sees_damaged_and_missing_checkpoints(spoiled: tuple[Path, Path, int]) -> None:
    run, reference, steps = spoiled
    flip_bit(run / "checkpoints/step_000010/__0_0.distcp")
    shutil.rmtree(run / "checkpoints/step_000020")
    found = soak.differences(run, reference, steps)
    assert len(found) == 2
    assert "__0_0.distcp does not have the SHA-256" in found[0]
    assert "step_000020" in found[1]


def test_draws_follow_the_seed_and_spread_the_kinds() -> None:
    faults = soak.draw(30, KINDS, processes=2, gap=8, seed=1)
    assert faults == soak.draw(30, KINDS, processes=2, gap=8, seed=1)
    assert faults != soak.draw(30, KINDS, processes=2, gap=8, seed=2)
    assert {fault.kind for fault in faults[: len(KINDS)]} == set(KINDS)
    assert {fault.rank for fault in faults} == {0, 1}
    steps = [fault.step for fault in faults]
    assert steps == sorted(set(steps))
