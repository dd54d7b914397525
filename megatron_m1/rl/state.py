"""A run of RL and its parts: what the loop, the steps and the callbacks work on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.rl.collecting import Collector, Judge
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.prompts import Prompts
from megatron_m1.rl.rewards.length_bias import LengthBias
from megatron_m1.rl.rollout.engine import Engine
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
    words: Tokenizer
    engine: Engine
    collector: Collector
    windows: Windows
    updates: int = field(default=0, kw_only=True)
    length_bias: LengthBias = field(kw_only=True)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.words

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
    # A run may be prolonged where its rate does not depend on its length.
    values["train"] = {"precision": config.train.precision}
    if config.optim.shape != "constant":
        values["train"]["steps"] = config.train.steps
    values["tokenizer"], values["data"] = tokenizer.sha256, prompts.fingerprint
    # Weights that were taught follow from the rest.
    values["load"] = None if config.teach.steps else config.checkpoint.load
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def build_collector(
    config: RLConfig, prompts: Prompts, tokenizer: Tokenizer, engine: Engine, judge: Judge
) -> Collector:
    folder = rollouts_folder(config)
    mark = fingerprint(config, tokenizer, prompts)
    return Collector(prompts, tokenizer, engine, judge, config, folder, mark)
