"""A server that dies in the middle of a run: what is said, and what is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_m1.errors import EXIT_UNFIT
from tests.distributed import Pool
from tests.rl.rollout.scripted import Answer, server
from tests.rl.rollout.small_run import ROOT, config, curve, overrides, responses, trained

# The first step's: more than one batch, since some prompts teach nothing.
BEFORE = 9


def respond(body: dict[str, Any]) -> Answer:
    """Two tokens that follow from what is asked for."""
    tokens = [33 + (7 * body["prompt_id"] + 3 * body["index"]) % 90, 40 + body["index"]]
    logprobs = {"token_logprobs": [-1.0, -1.0], "raw_token_logprobs": [-1.0, -1.0]}
    choice = {
        "finish_reason": "stop",
        "stop_reason": "x",
        "token_ids": tokens,
        "logprobs": logprobs,
    }
    return 200, {"model": body["model"], "choices": [choice]}


def http(url: str) -> list[str]:
    servers = [f"rollout.http.urls=[{url}]", "rollout.http.attempts=2", "rollout.http.timeout=5"]
    return ["rollout=http", *servers, "rollout.http.backoff=0.01", "rollout.http.concurrency=2"]


def test_responses_that_were_paid_for_are_kept(
    ranks: Callable[[int], Pool], tmp_path: Path
) -> None:
    died = threading.Event()

    def dying(number: int, body: dict[str, Any]) -> Answer:
        if number < BEFORE:
            return respond(body)
        died.set()
        return 0, None

    with server(dying) as served:
        arguments = overrides(tmp_path, *http(served.url), f"run_dir={tmp_path}/run")
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_m1.train_rl", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert died.wait(120)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_UNFIT
    assert "Traceback" not in errors
    (said,) = [line for line in errors.splitlines() if line.startswith("error")]
    assert said.startswith(f"error: rollout.http.urls={served.url}: no answer in 2 attempt(s)")
    kept = responses(tmp_path / "run")
    assert len(kept) == BEFORE

    with server(lambda number, body: respond(body)) as other:
        given = config(tmp_path, *http(other.url), f"run_dir={tmp_path}/run")
        ranks(1).run(trained, given)
    asked = {(body["prompt_id"], body["index"]) for body in other.bodies}
    assert asked.isdisjoint((prompt, index) for _, prompt, index in kept)
    assert responses(tmp_path / "run").items() >= kept.items()
    assert [record["train/step"] for record in curve(tmp_path / "run")] == [1, 2, 3]
