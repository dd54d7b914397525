"""A run of RL on prompts whose rewards a model that knows nothing gets, and servers for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_m1.config_loading import load
from megatron_m1.rl.config import RLConfig
from megatron_m1.train_rl import train
from parallel.layout import Layout

ROOT = Path(__file__).resolve().parents[3]
OVERRIDES = [
    *("model=demo_rl", "model.num_layers=2", "model.layer_pattern=LS", "model.hidden_size=32"),
    *("model.ffn_hidden_size=32", "train.precision=fp32", "logger=quiet", "train.report=false"),
    *("data=files", "data.tokenizer=bytes", "reward.slots=1", "checkpoint.save_at_end=false"),
    *("rl.prompts_per_batch=4", "rl.group_size=4", "rl.updates_per_batch=2", "rl.refills=4"),
    *("rollout.max_new_tokens=7", "rollout.tokens_per_step=4", "rollout.slots=4"),
    *("optim.lr=1e-2", "optim.min_lr=1e-2", "train.steps=3"),
]
# Of time, of the machine, and of servers alone.
FREE = ("time", "timing_s", "perf", "moe", "rollout/retries", "rollout/stale", "rollout/encoded")
VERIFIER = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(sum(solution_str.encode()) % 2)
"""


def overrides(folder: Path, *more: str) -> list[str]:
    """The arguments of a run whose files are in ``folder``."""
    prompts, verifier = folder / "prompts.jsonl", folder / "verifier.py"
    row = {"data_source": "odd", "reward_model": {"ground_truth": ""}}
    prompts.write_text("\n".join(json.dumps({**row, "prompt": f"{n}?"}) for n in range(40)))
    verifier.write_text(VERIFIER)
    return [
        *OVERRIDES,
        f"data.files=[{prompts}]",
        f"reward.verifiers=[{{data_source: odd, use: function, file: {verifier}}}]",
        *more,
    ]


def config(folder: Path, *more: str) -> RLConfig:
    return load("train_rl", RLConfig, overrides(folder, *more))


def trained(config: RLConfig) -> None:
    """The run, in this process and those beside it."""
    config.parallel.build_groups()
    train(config)


def curve(run: Path) -> list[dict[str, Any]]:
    """The records of the steps, without what depends on the machine or the engine."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "train/step" in record]
    return [{k: v for k, v in record.items() if not k.startswith(FREE)} for record in records]


def responses(run: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Those of the journals, by step, prompt and place in the group."""
    found = {}
    for path in sorted((run / "rollouts").glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            if one := line.get("response"):
                found[path.name, one["prompt_id"], one["index"]] = one
    return found


def write_start(config: RLConfig, path: Path) -> None:
    """Weights of the run's model that are not the run's."""
    from megatron_m1.checkpoint.weights_only import save_weights
    from megatron_m1.model.build import build_chunks
    from megatron_m1.model.transformer_config import transformer_config
    from megatron_m1.rl.sources import open_tokenizer

    Layout().build_groups()
    transformer = transformer_config(config.model, Layout(), precision="fp32")
    chunks = build_chunks(config.model, transformer, seed=99)
    save_weights(chunks, config.model, open_tokenizer(config), path)


@contextmanager
def program(*command: str, says: str, log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server, and the line of its output that has ``says`` in it; ended with the block."""
    # Programs of Hugging Face would ask the network for newer versions of themselves.
    alone = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **alone}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        deadline = time.monotonic() + 150
        while not (lines := [line for line in log.read_text().splitlines() if says in line]):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield process, lines[0]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def own_server(checkpoint: Path, log: Path, *more: str) -> Iterator[tuple[Any, str]]:
    """``megatron_m1.serve``, and its address."""
    command = ["-m", "megatron_m1.serve", f"checkpoint.load={checkpoint}", "server.port=0"]
    settings = ["server.slots=4", "server.max_length=64", *more]
    with program(*command, *settings, says="served at ", log=log) as (process, line):
        yield process, line.split()[-1]
