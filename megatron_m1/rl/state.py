"""A run of RL and its parts: what the loop, the steps and the callbacks work on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.rl.collecting import Collector
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.overlap import OverlappedCollector
from megatron_m1.rl.prompts import Prompts
from megatron_m1.rl.recording import Judge, alone
from megatron_m1.rl.rewards.length_bias import LengthBias
from megatron_m1.rl.rollout.engine import Engine, RemoteEngine
from megatron_m1.rl.windows import Windows
from megatron_m1.training.state import Training

# What no draw depends on. Nor does it on the layout, but for the last bits of the weights.
_FREE = ("run_dir", "checkpoint", "logger", "parallel", "world_size", "dry_run")


@dataclass
class RLRun(Training):
    """Everything that RL holds.

    Attributes:
        updates: finished optimizer steps.
        length_bias: whether generative rewards pay for length.
    """

    config: RLConfig
    engine: Engine
    collector: Collector | OverlappedCollector
    windows: Windows
    tokenizer: Tokenizer = field(kw_only=True)
    updates: int = field(default=0, kw_only=True)
    length_bias: LengthBias = field(kw_only=True)

    @property
    def total_steps(self) -> int:
        return self.config.train.steps

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.total_steps

    def state_dict(self) -> dict[str, Any]:
        return {
            "progress": asdict(self.progress),
            "rl": {
                "updates": self.updates,
                "prompts": self.collector.state_dict(),
                "windows": self.windows.state_dict(),
                "length_bias": self.length_bias.state_dict(),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.progress.step = state["progress"]["step"]
        self.progress.tokens = state["progress"]["tokens"]
        self.updates = state["rl"]["updates"]
        self.collector.load_state_dict(state["rl"]["prompts"])
        self.windows.load_state_dict(state["rl"]["windows"])
        self.length_bias.load_state_dict(state["rl"]["length_bias"])
        self.engine.weights_changed(self.progress.step)


def rollouts_folder(config: RLConfig) -> Path:
    """Where a run keeps the responses that it paid for: beside its checkpoints."""
    return config.checkpoint_dir.parent / "rollouts"


def fingerprint(config: RLConfig, tokenizer: Tokenizer, prompts: Prompts) -> str:
    """Of everything that a response depends on."""
    values = {key: value for key, value in asdict(config).items() if key not in _FREE}
    # Where servers are and how they are asked changes no draw.
    is_remote = config.rollout.engine == "http"
    values["rollout"]["http"] = config.rollout.http.server if is_remote else None
    # A run may be prolonged where its rate does not depend on its length.
    values["train"] = {"precision": config.train.precision}
    if config.optim.shape != "constant":
        values["train"]["steps"] = config.train.steps
    values["tokenizer"], values["data"] = tokenizer.sha256, prompts.fingerprint
    # Weights that were taught follow from the rest.
    values["load"] = None if config.teach.steps else config.checkpoint.load
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def collecting(
    config: RLConfig, prompts: Prompts, tokenizer: Tokenizer, engine: Engine, judge: Judge
) -> Iterator[Collector | OverlappedCollector]:
    """What fills the batches of a run, until the block ends."""
    folder = rollouts_folder(config)
    mark = fingerprint(config, tokenizer, prompts)
    if config.rl.max_staleness == 0:
        yield Collector(prompts, tokenizer, engine.generate, judge, config, folder, mark)
        return
    assert isinstance(engine, RemoteEngine)
    collector = Collector(
        prompts, tokenizer, engine.responses, judge, config, folder, mark, share=alone
    )
    with OverlappedCollector(
        collector, engine, config.rl.max_staleness, config.train.steps
    ) as overlapped:
        yield overlapped
