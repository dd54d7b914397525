"""Advantages of responses within their groups. R responses, P prompts."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, prompt_index: Tensor, valid: Tensor | None = None) -> Tensor:
    """(reward - mean of the group) / standard deviation of the group, Eq. 2 of MiniMax-M1.

    The standard deviation is that of a sample (G - 1), as in verl and TRL, and nothing is added to
    it: a group without spread, or of one response, has the advantages 0.

    Args:
        rewards: `[R]`.
        prompt_index: `[R]` the prompt of each response, any integers.
        valid: `[R]` false for responses without a reward: they count in no group, and have the
            advantage 0.

    Returns:
        `[R]` float32.

    Raises:
        ValueError: a reward that is not finite, or shapes that differ.
    """
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid.bool()
    if not rewards.shape == prompt_index.shape == valid.shape:
        raise ValueError(
            "rewards, prompt_index and valid must have one shape, got "
            f"{list(rewards.shape)}, {list(prompt_index.shape)}, {list(valid.shape)}"
        )
    rewards = torch.where(valid, rewards.double(), 0.0)
    if not rewards.isfinite().all():
        bad = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"the reward of response {bad} is {float(rewards[bad])}, not a number")
    prompts, group = prompt_index.unique(return_inverse=True)

    def total(values: Tensor) -> Tensor:
        """`[R]`, the sum over each response's group."""
        return rewards.new_zeros(len(prompts)).index_add_(0, group, values)[group]

    count = total(valid.double())
    centred = torch.where(valid, rewards - total(rewards) / count.clamp(min=1), 0.0)
    variance = total(centred.square()) / (count - 1).clamp(min=1)
    # Equal rewards may differ from their rounded mean, so the spread is not read from the variance.
    spread = _has_spread(rewards, group, len(prompts), valid)
    return torch.where(spread, centred / variance.clamp(min=1e-300).sqrt(), 0.0).float()


def _has_spread(rewards: Tensor, group: Tensor, prompts: int, valid: Tensor) -> Tensor:
    """`[R]` whether valid rewards of the response's group differ."""

    def extreme(operation: str, worst: float) -> Tensor:
        found = rewards.new_full((prompts,), worst)
        return found.scatter_reduce_(0, group, torch.where(valid, rewards, worst), operation)

    return (extreme("amax", -torch.inf) > extreme("amin", torch.inf))[group]
