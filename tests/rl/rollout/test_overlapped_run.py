"""A run that trains while a real server draws for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.errors import EXIT_STOPPED
from tests.distributed import Pool
from tests.rl.rollout.small_run import (
    ROOT,
    config,
    curve,
    overrides,
    own_server,
    responses,
    trained,
    write_start,
)

STEPS = 5
AGE = "training/off_policy/trajectory_staleness/max"


@pytest.fixture(scope="module")
def server(ranks: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    ranks(1).run(write_start, config(folder), folder / "start")
    with own_server(folder / "start", folder / "log") as (process, url):
        yield url
    assert process.returncode == 0, (folder / "log").read_text()


def asynchronous(folder: Path, url: str, *more: str) -> list[str]:
    return [
        *("rollout=http", f"rollout.http.urls=[{url}]", "rollout.http.backoff=0.05"),
        *("rl.max_staleness=1", "rl.old_logprobs=rollout", "rollout.tokens_per_step=null"),
        *(f"train.steps={STEPS}", f"run_dir={folder}/run", *more),
    ]


def ages(run: Path) -> list[int]:
    """Of every token that was drawn: versions from its weights to those of its batch's step."""
    return [
        int(name.removeprefix("step_").removesuffix(".jsonl")) - 1 - version
        for (name, *_), response in responses(run).items()
        for version in response["versions"]
    ]


def assert_bounded(run: Path, steps: int = STEPS) -> None:
    assert 0 <= min(ages(run)) <= max(ages(run)) == 1
    records = curve(run)
    assert [record["train/step"] for record in records] == list(range(1, steps + 1))
    assert max(record[AGE] for record in records) == 1
    assert all(record["rollout/groups"] == 4 for record in records)


@pytest.mark.parametrize(("size", "layout"), [(1, []), (2, []), (2, ["parallel.tp=2"])])
def test_no_token_is_older_than_allowed(
    size: int, layout: list[str], ranks: Callable[[int], Pool], server: str, tmp_path: Path
) -> None:
    given = config(tmp_path, *asynchronous(tmp_path, server, *layout))
    ranks(size).run(trained, given)
    assert_bounded(tmp_path / "run")
    first, *_ = curve(tmp_path / "run")
    # Nothing is stale at the first step, where rollout and trainer have the same weights.
    assert first[AGE] == 0
    assert first["training/rollout_probs_diff_max"] < 1e-5


def lines_of(run: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in run.glob("rollouts/*.jsonl"))


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("train/step") if path.exists() else 0


def started(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_m1.train_rl", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def signalled(arguments: list[str], number: int, is_time: Callable[[], bool]) -> int:
    """The exit status of a run that gets a signal at a moment."""
    process = started(arguments)
    deadline = time.monotonic() + 150
    try:
        while not is_time():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        process.communicate(timeout=100)
        return process.returncode
    finally:
        process.kill()
        process.communicate()


def drawn(run: Path) -> dict[Any, Any]:
    return {key: (one["tokens"], one["versions"]) for key, one in responses(run).items()}


def test_a_run_goes_on_after_a_kill_and_a_stop(server: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["checkpoint.every=1", "train.steps=9"]
    arguments = overrides(tmp_path, *asynchronous(tmp_path, server, *more))
    assert signalled(arguments, signal.SIGKILL, lambda: lines_of(run) >= 60) == -signal.SIGKILL
    before = drawn(run)
    reached = max(steps_of(run), 1)
    stopped = signalled(arguments, signal.SIGTERM, lambda: steps_of(run) > reached)
    assert stopped == EXIT_STOPPED
    between = drawn(run)
    process = started(arguments)
    _, error = process.communicate(timeout=150)
    assert process.returncode == 0, error
    after = drawn(run)
    # A file of a step that every checkpoint is past goes; what was drawn is never drawn again.
    assert all(between[key] == value for key, value in before.items() if key in between)
    assert all(after[key] == value for key, value in between.items() if key in after)
    assert len(lines := journal_keys(run)) == len(set(lines))
    assert_bounded(run, 9)


def journal_keys(run: Path) -> list[tuple[str, int, int]]:
    """One for each response that was written, were it written twice."""
    return [
        (path.name, one["prompt_id"], one["index"])
        for path in run.glob("rollouts/*.jsonl")
        for line in path.read_text().splitlines()
        if (one := json.loads(line).get("response"))
    ]
