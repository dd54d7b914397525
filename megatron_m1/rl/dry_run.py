"""What a run of RL would be: its configuration, layout, sizes and memory, without starting it."""

from __future__ import annotations

from megatron_m1.dry_run import as_yaml, model_lines
from megatron_m1.planning import memory
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.config_checks import as_pretraining


def describe(config: RLConfig, world_size: int) -> str:
    """The answer to ``dry_run=true``."""
    rl, steps = config.rl, config.train.steps
    responses = rl.prompts_per_batch * rl.group_size
    windows = " -> ".join(map(str, rl.windows.stages or [config.rollout.max_new_tokens]))
    fullest = memory.estimate(as_pretraining(config, world_size), world_size)
    return "\n".join(
        [
            "# configuration",
            as_yaml(config).rstrip(),
            "# layout",
            config.parallel.describe(world_size),
            "# model",
            *model_lines(config.model, config.train.row_tokens),
            "# run",
            f"{steps:,} steps, {steps * rl.updates_per_batch:,} updates",
            f"{responses:,} responses in a step: {rl.prompts_per_batch:,} prompts x "
            f"{rl.group_size}; of {windows} tokens at most",
            "# memory of an update (estimate; the rollout's states and caches are not in it)",
            f"{round(fullest.parameters):,} parameters on the fullest process",
            fullest.describe(),
        ]
    )
