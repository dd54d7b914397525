"""A run that is killed: nothing paid for is lost, and its curve is the unbroken one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5
OVERRIDES = [
    *("model=demo_rl", "model.num_layers=2", "model.layer_pattern=LS", "model.hidden_size=32"),
    *("model.ffn_hidden_size=32", "train.precision=fp32", "logger=quiet", "train.report=false"),
    *("data.tasks=[{name: brackets, knobs: {length: 3, kinds: 1}}, {name: boolean_logic}]",),
    *(
        "teach.steps=80",
        "teach.lr=1e-2",
        "teach.examples=400",
        "teach.batch=4",
        "teach.seq_length=128",
    ),
    *("rl.prompts_per_batch=4", "rl.group_size=6", "rl.updates_per_batch=2", "rl.refills=3"),
    *("rollout.max_new_tokens=6", "rollout.tokens_per_step=3", "rollout.slots=4"),
    *("optim.lr=1e-3", "optim.min_lr=1e-3", f"train.steps={STEPS}", "checkpoint.every=2"),
]
FREE = ("time", "timing_s", "perf", "rollout/tokens", "moe")


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "megatron_m1.train_rl", *OVERRIDES, f"run_dir={folder}", *more]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(folder: Path, *more: str) -> None:
    subprocess.run(command(folder, *more), cwd=ROOT, env=environment(), check=True, timeout=170)


def curve(folder: Path) -> list[dict[str, Any]]:
    """The records of the steps, without what depends on the machine or the interruption."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "train/step" in record]
    return [
        {name: value for name, value in record.items() if not name.startswith(FREE)}
        for record in records
    ]


def assert_same(found: Path, expected: Path) -> None:
    """Up to the last bits: what is left to draw may be computed beside other sequences."""
    for one, other in zip(curve(found), curve(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def lines_of(folder: Path) -> int:
    """Responses and rewards that the journal holds."""
    return sum(len(path.read_bytes().splitlines()) for path in folder.glob("rollouts/*.jsonl"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return folder


def copy_of_taught(source: Path, folder: Path) -> None:
    shutil.copytree(source / "taught", folder / "taught")


def kill_when(folder: Path, is_time: Any) -> None:
    """Start the run and kill it with SIGKILL at a moment."""
    process = subprocess.Popen(command(folder), cwd=ROOT, env=environment())
    deadline = time.monotonic() + 150
    try:
        while not is_time():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_curve_has_what_a_reader_looks_for(unbroken: Path) -> None:
    records = curve(unbroken)
    assert [record["train/step"] for record in records] == list(range(1, STEPS + 1))
    assert any(record["rollout/paused"] > 0 for record in records)
    judged = [record for record in records if "critic/rewards/mean" in record]
    assert len(judged) > 1
    assert all("response_length/mean" in record for record in judged)
    trained = [record for record in records if "actor/entropy" in record]
    assert len(trained) > 1
    for name in ("actor/pg_loss", "actor/grad_norm", "actor/pg_clipfrac", "cispo/ratio_mean"):
        assert all(name in record for record in trained)


@pytest.mark.parametrize("responses", [3, 40, 75])
def test_killed_while_it_generates(unbroken: Path, tmp_path: Path, responses: int) -> None:
    copy_of_taught(unbroken, tmp_path)
    kill_when(tmp_path, lambda: lines_of(tmp_path) >= responses)
    run(tmp_path)
    assert_same(tmp_path, unbroken)


def test_killed_between_a_step_and_its_checkpoint(unbroken: Path, tmp_path: Path) -> None:
    copy_of_taught(unbroken, tmp_path)
    kill_when(tmp_path, (tmp_path / "rollouts" / "step_000004.jsonl").exists)
    kept = (tmp_path / "rollouts" / "step_000003.jsonl").read_bytes()
    run(tmp_path)
    assert_same(tmp_path, unbroken)
    # Step 3 was taken again from step 2's checkpoint, and none of its responses paid for again.
    again = (tmp_path / "rollouts" / "step_000003.jsonl").read_bytes()
    assert again == kept


def test_a_longer_run_goes_on(unbroken: Path, tmp_path: Path) -> None:
    copy_of_taught(unbroken, tmp_path)
    run(tmp_path, "train.steps=3")
    run(tmp_path)
    assert_same(tmp_path, unbroken)
