"""A run that the server of transformers draws for, with weights that our exporter wrote for it."""

from __future__ import annotations

import importlib.util
import json
import math
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed import Pool
from tests.rl.rollout.small_run import config, curve, program, responses, trained

WANTED = ("fastapi", "uvicorn", "openai", "accelerate")
MISSING = [name for name in WANTED if not importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)}"
)
OVERRIDES = [
    *("rollout=http", "rollout.http.server=transformers", "rollout.http.concurrency=4"),
    *("rollout.tokens_per_step=null", "rl.old_logprobs=rollout", "rl.refills=1"),
    *("rl.prompts_per_batch=2", "rl.updates_per_batch=1", "rl.dynamic_sampling=false"),
    "train.steps=2",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1"]
    log = tmp_path_factory.mktemp("transformers") / "log"
    settings = ["--port", str(port), "--device", "cpu"]
    with program(*command, *settings, says="Uvicorn running on", log=log):
        yield f"http://127.0.0.1:{port}"


def test_two_steps(ranks: Callable[[int], Pool], server: str, tmp_path: Path) -> None:
    given = config(tmp_path, *OVERRIDES, f"rollout.http.urls=[{server}]", f"run_dir={tmp_path}/run")
    ranks(1).run(trained, given)
    records = curve(tmp_path / "run")
    assert [record["train/step"] for record in records] == [1, 2]
    for record in records:
        # It tells no log-probabilities, so nothing is compared and the trainer's are trained with.
        assert record["training/rollout_logprobs_missing"] == 1
        assert not any(name.startswith("rollout_corr") for name in record)
        assert "rollout/perplexity" not in record
        assert math.isfinite(record["actor/pg_loss"]) and record["actor/entropy"] > 0
    assert any(record["actor/grad_norm"] > 0 for record in records)
    drawn = responses(tmp_path / "run").values()
    assert {version for one in drawn for version in one["versions"]} == {0, 1}
    assert len(drawn) == 16 and all(1 <= len(one["tokens"]) <= 7 for one in drawn)
    for folder in (tmp_path / "run" / "weights").iterdir():
        described = json.loads((folder / "config.json").read_text())
        assert described["architectures"] == ["MiniMaxForCausalLM"]
