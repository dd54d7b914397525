"""Learning rate and batch size as functions of what has been trained so far.

MiniMax-Text-01 (arXiv 2501.08313, section 4.2) trains in phases: warm-up, two constant stretches,
an exponential decay, and a batch that doubles at given token counts.
"""

from __future__ import annotations

import itertools
import math

from megatron_m1.config import LrPhase, OptimConfig, TrainConfig


def global_batch(train: TrainConfig, tokens: int) -> int:
    """Rows of the next step after ``tokens`` trained tokens."""
    reached = [phase for phase in train.batch_phases if tokens >= phase.from_tokens]
    if not reached:
        return train.global_batch
    return max(reached, key=lambda phase: phase.from_tokens).global_batch


def total_tokens(train: TrainConfig) -> int:
    """Tokens of the whole run."""
    return _length(train)[1] if train.tokens is None else train.tokens


def total_steps(train: TrainConfig) -> int:
    """Optimizer steps of the whole run."""
    return _length(train)[0]


def _length(train: TrainConfig) -> tuple[int, int]:
    """Steps of the whole run and the tokens they read, counted by stretches of one batch size."""
    starts = sorted({0, *(phase.from_tokens for phase in train.batch_phases)})
    steps, tokens = 0, 0
    for start, end in itertools.zip_longest(starts, starts[1:]):
        per_step = global_batch(train, start) * train.seq_length
        if train.steps is not None:
            left = train.steps - steps
        else:
            left = _ceil_div((train.tokens or 0) - tokens, per_step)
        here = left if end is None else min(left, _ceil_div(end - tokens, per_step))
        steps += max(here, 0)
        tokens += max(here, 0) * per_step
    return steps, tokens


def _ceil_div(amount: int, size: int) -> int:
    return -(-amount // size)


def learning_rate(optim: OptimConfig, step: int, tokens: int, total: int) -> float:
    """The rate of the step that follows ``step`` finished steps and ``tokens`` trained tokens.

    Args:
        total: tokens of the whole run, over which the rate goes from ``lr`` to ``min_lr`` where no
            phases are given.
    """
    phases = optim.phases or [
        LrPhase(tokens=total, lr=optim.lr, end_lr=optim.min_lr, shape=optim.shape)
    ]
    rate = _phase_rate(phases, tokens)
    if step < optim.warmup_steps:
        rate *= (step + 1) / optim.warmup_steps
    return rate


def _phase_rate(phases: list[LrPhase], tokens: int) -> float:
    for phase in phases:
        if tokens < phase.tokens:
            return _between(phase, tokens / phase.tokens)
        tokens -= phase.tokens
    return _between(phases[-1], 1.0)


def _between(phase: LrPhase, part: float) -> float:
    """The rate after ``part`` (0 to 1) of a phase."""
    start = phase.lr
    end = start if phase.end_lr is None else phase.end_lr
    if phase.shape == "linear":
        return start + (end - start) * part
    if phase.shape == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * part)) / 2
    if phase.shape == "exponential":
        return start * (end / start) ** part
    return start
