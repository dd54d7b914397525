"""What a run would be: its configuration, layout, sizes and memory, without starting it."""

from __future__ import annotations

from dataclasses import asdict

import yaml

from megatron_m1.config import CommonConfig, RunConfig
from megatron_m1.model.config import ModelConfig
from megatron_m1.planning import memory
from megatron_m1.training import phases


def describe(config: RunConfig, world_size: int) -> str:
    """The answer to ``dry_run=true``."""
    model, train = config.model, config.train
    steps = phases.total_steps(train)
    fullest = memory.estimate(config, world_size)
    return "\n".join(
        [
            "# configuration",
            as_yaml(config).rstrip(),
            "# layout",
            config.parallel.describe(world_size),
            "# model",
            *model_lines(model, train.seq_length),
            "# run",
            f"{steps:,} steps, {phases.total_tokens(train):,} tokens, "
            f"{train.global_batch * train.seq_length:,} tokens in the first step",
            "# memory (estimate)",
            f"{round(fullest.parameters):,} parameters on the fullest process",
            fullest.describe(),
        ]
    )


def model_lines(model: ModelConfig, length: int) -> list[str]:
    """The model's sizes, and its operations in documents of ``length`` tokens."""
    kinds = model.layer_kinds
    body, active = model.num_params(), model.active_params()
    return [
        f"{kinds.count('L')} lightning and {kinds.count('S')} softmax layers",
        f"{body:,} parameters; {active:,} active a token without embedding and LM head",
        f"{model.flops_per_token(length) / 1e9:,.2f} GFLOP a trained token at documents of "
        f"{length} tokens",
    ]


def as_yaml(config: CommonConfig) -> str:
    """The resolved configuration, in the words of ``conf/`` and the command line."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
