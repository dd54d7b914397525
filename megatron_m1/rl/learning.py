"""What a step does with its batch: advantages, old log-probabilities, updates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_m1.rl import late
from megatron_m1.rl.batch import pack, samples_of
from megatron_m1.rl.groups import Group, parts
from megatron_m1.rl.state import RLRun
from megatron_m1.rl.token_loss import objective
from megatron_m1.rl.update import (
    add_old_logprobs,
    compared,
    comparison_metrics,
    metrics_over_ranks,
    own_rows,
    take_rollout_logprobs,
    update,
)
from megatron_m1.training import phases
from megatron_m1.training.state import data_rank


@dataclass
class Learned:
    """What the updates of a step did, on every process alike.

    Attributes:
        metrics: over all tokens and updates; none of a batch without groups.
        learning_rate: of the last update.
        tokens: response tokens that were trained on.
        positions: of the rows, prompts and padding included.
        advantages: of the responses.
        old_seconds, update_seconds: time spent.
    """

    metrics: dict[str, float]
    learning_rate: float
    tokens: int
    positions: int
    advantages: list[float]
    old_seconds: float
    update_seconds: float


def learn(run: RLRun, groups: Sequence[Group], window: int) -> Learned:
    """Train on a batch: ``updates_per_batch`` updates, each on its part of it. Collective.

    Args:
        window: tokens that its responses may have.
    """
    config = run.config
    started = time.perf_counter()
    minibatches = [
        samples_of(part, config.rl, window) for part in parts(groups, config.rl.updates_per_batch)
    ]
    packed = [
        pack(samples, config.train.row_tokens, config.parallel, data_rank()[1])
        for samples in minibatches
    ]
    rows = [own_rows(whole, config.parallel) for whole in packed]
    comparisons = []
    for part in rows:
        add_old_logprobs(run.chunks, part)
        comparisons += compared(part)
        if config.rl.old_logprobs == "rollout":
            take_rollout_logprobs(part)
    prepared = time.perf_counter()

    limits = late.bounds(config, run.progress.step, window)
    loss = objective(config.rl, limits.is_weight_max)
    sums, norms, rate = [], [], 0.0
    for part in rows:
        rate = learning_rate(run)
        found, norm = update(run, part, loss, rate, limits.clip_grad)
        sums += found
        norms.append(norm)
        run.updates += 1
    metrics = {**comparison_metrics(comparisons), **metrics_over_ranks(sums)}
    if norms:
        metrics["actor/grad_norm"] = fmean(norms)
    return Learned(
        metrics,
        rate,
        sum(len(sample.response.tokens) for samples in minibatches for sample in samples),
        sum(len(row) for whole in packed for row in whole),
        [sample.advantage for samples in minibatches for sample in samples],
        prepared - started,
        time.perf_counter() - prepared,
    )


def learning_rate(run: RLRun) -> float:
    """The rate of the next update; it goes from ``lr`` to ``min_lr`` over all updates."""
    total = run.total_steps * run.config.rl.updates_per_batch
    return phases.learning_rate(run.config.optim, run.updates, run.updates, total)
