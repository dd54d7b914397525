"""A run of RL small enough for tests, and a batch of responses that nobody generated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_m1.config import LoggerConfig, OptimConfig
from megatron_m1.rl.config import PolicyConfig, RLConfig, RolloutConfig, StepsConfig
from megatron_m1.rl.groups import Group
from megatron_m1.rl.samples import Prompt, Response, Scored
from parallel.layout import Layout
from tests.training import small_run

MODEL = replace(small_run.MODEL, aux_loss_coef=0.0)


def rl_config(folder: str, layout: Layout | None = None, **sections: Any) -> RLConfig:
    """A run in ``folder``; ``sections`` replace whole sections."""
    config = RLConfig(
        model=MODEL,
        parallel=layout or Layout(),
        optim=OptimConfig(lr=1e-3, min_lr=1e-3, eps=1e-15, clip_grad=0.5, shape="constant"),
        logger=LoggerConfig(console=False, wandb="disabled"),
        rl=PolicyConfig(group_size=4, prompts_per_batch=4, updates_per_batch=2),
        rollout=RolloutConfig(max_new_tokens=24),
        train=StepsConfig(steps=3, row_tokens=64, precision="fp32", report=False),
        run_dir=folder,
    )
    return replace(config, **sections)


def stored_groups(prompts: int = 4, size: int = 4) -> list[Group]:
    """Groups of skewed lengths (1 to 24 tokens) with rewards that differ."""
    random = torch.Generator().manual_seed(3)

    def number(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (1,), generator=random))

    groups = []
    for prompt in range(prompts):
        tokens = tuple(number(0, MODEL.vocab_size - 1) for _ in range(number(1, 9)))
        group = Group(Prompt(prompt, "stored", "", None), tokens, size)
        for index in range(size):
            length = 1 if prompt == index == 0 else number(1, 24)
            raw = (torch.rand(length, generator=random) * -6).tolist()
            drawn = [number(0, MODEL.vocab_size - 1) for _ in range(length)]
            response = Response(prompt, index, drawn, raw, raw, [0] * length, "stop")
            group.responses[index] = response
            group.scored.append(Scored(response, float((prompt + index) % 3)))
        groups.append(group)
    return groups
