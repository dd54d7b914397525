"""The loss of a batch does not depend on how the batch is laid out or cut: one [R, T] table, packed
rows, micro-batches, data-parallel and context-parallel parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_m1.rl.aggregation import AGGREGATIONS, response_weights, token_weights
from megatron_m1.rl.objectives import cispo_loss, dapo_loss, summed_cispo, summed_ppo
from megatron_m1.rl.token_sums import TokenSums

R, T = 12, 9
CISPO = {"is_weight_max": 1.5, "is_weight_min": 0.25, "mask_max": 2.0, "mask_min": 0.5}
PPO = {"ratio_max": 1.28, "ratio_min": 0.8}
KINDS = [(cispo_loss, partial(summed_cispo, **CISPO), CISPO), (dapo_loss, summed_ppo, PPO)]
Summed = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, TokenSums]]

every_kind = pytest.mark.parametrize(("whole", "summed", "bounds"), KINDS, ids=["cispo", "ppo"])
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)


class Batch:
    """Responses of uneven lengths to prompts with uneven groups, and one left out."""

    def __init__(self, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.old = -torch.rand(R, T, generator=random, dtype=torch.float64) * 3
        self.logprobs = self.old + torch.randn(R, T, generator=random, dtype=torch.float64)
        self.advantages = torch.randn(R, generator=random, dtype=torch.float64)
        self.prompts = torch.tensor([4, 4, 4, 4, 1, 1, 1, 9, 9, 9, 9, 9])
        self.lengths = torch.randint(1, T + 1, (R,), generator=random)
        self.lengths[5] = 0
        self.mask = torch.arange(T) < self.lengths[:, None]


def whole_batch(batch: Batch, whole, bounds, aggregation: str) -> tuple[float, Tensor, dict]:
    logprobs = batch.logprobs.clone().requires_grad_()
    loss, metrics = whole(
        logprobs,
        batch.old,
        batch.advantages,
        batch.mask,
        prompt_index=batch.prompts,
        aggregation=aggregation,
        **bounds,
    )
    loss.backward()
    return loss.item(), logprobs.grad, metrics


def in_parts(batch: Batch, parts: Sequence[Tensor], summed: Summed, aggregation: str):
    """The loss, gradient and metrics of tokens cut in parts, each a list of flat places."""
    weights = token_weights(batch.mask, batch.prompts, aggregation).flatten()
    flat = [batch.old.flatten(), batch.advantages.repeat_interleave(T), weights]
    logprobs = batch.logprobs.flatten().clone().requires_grad_()
    total, sums = 0.0, []
    for places in parts:
        loss, part = summed(logprobs[places], *(values[places] for values in flat))
        loss.backward()
        total += loss.item()
        sums.append(part)
    return total, logprobs.grad.reshape(R, T), TokenSums.merged(sums).metrics()


def agree(found, expected) -> None:
    loss, gradient, metrics = found
    assert loss == pytest.approx(expected[0], abs=1e-12)
    assert torch.allclose(gradient, expected[1], atol=1e-14)
    assert metrics == pytest.approx(expected[2], abs=1e-12)


@every_aggregation
@every_kind
@pytest.mark.parametrize("size", [1, 2, 5, R])
def test_micro_batches_of_responses(whole, summed, bounds, aggregation, size):
    batch = Batch()
    summed = partial(summed, **bounds)
    parts = torch.arange(R * T).split(size * T)
    expected = whole_batch(batch, whole, bounds, aggregation)
    assert math.isfinite(expected[0]) and expected[0] != 0
    agree(in_parts(batch, parts, summed, aggregation), expected)


@every_aggregation
@every_kind
def test_any_cut_of_tokens(whole, summed, bounds, aggregation):
    # Context parallelism gives a rank parts of responses, and sometimes none that is live.
    batch = Batch(1)
    order = torch.randperm(R * T, generator=torch.Generator().manual_seed(3))
    dead = (~batch.mask.flatten()).nonzero()[:, 0]
    parts = [*order.chunk(7), dead, order[:0]]
    expected = whole_batch(batch, whole, bounds, aggregation)
    agree(in_parts(batch, parts, partial(summed, **bounds), aggregation), expected)


@every_aggregation
@every_kind
def test_packed_rows(whole, summed, bounds, aggregation):
    """Prompts and responses side by side, without padding, and a weight of 0 at the prompts."""
    batch = Batch(2)
    per_token = response_weights(batch.lengths, batch.prompts, aggregation)
    packed: list[list[Tensor]] = []
    for response in (3, 1, 11, 0, 5, 2, 4, 10, 6, 9, 8, 7):
        length, prompt = int(batch.lengths[response]), torch.full((2 + response % 3,), torch.nan)
        for values, outside in (
            (batch.logprobs[response], prompt),
            (batch.old[response], prompt),
            (batch.advantages[response].expand(T), prompt),
            (per_token[response].expand(T), torch.zeros_like(prompt)),
        ):
            packed.append([outside.double(), values[:length]])
    columns = [torch.cat([part for parts in packed[i::4] for part in parts]) for i in range(4)]
    loss, sums = summed(*columns, **bounds)
    expected, _, metrics = whole_batch(batch, whole, bounds, aggregation)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert sums.metrics() == pytest.approx(metrics, abs=1e-12)


@every_aggregation
@every_kind
def test_the_order_of_responses_and_the_names_of_prompts(whole, summed, bounds, aggregation):
    batch, shuffled = Batch(4), Batch(4)
    order = torch.randperm(R, generator=torch.Generator().manual_seed(5))
    for name in ("old", "logprobs", "advantages", "lengths", "mask"):
        setattr(shuffled, name, getattr(batch, name)[order])
    shuffled.prompts = 100 - batch.prompts[order]
    loss, gradient, metrics = whole_batch(batch, whole, bounds, aggregation)
    found = whole_batch(shuffled, whole, bounds, aggregation)
    agree(found, (loss, gradient[order], metrics))


@every_aggregation
@every_kind
def test_padding_to_a_longer_table(whole, summed, bounds, aggregation):
    batch, padded = Batch(6), Batch(6)
    for name in ("old", "logprobs"):
        values = getattr(batch, name)
        setattr(padded, name, torch.cat([values, torch.full((R, 3), torch.nan)], 1))
    padded.mask = torch.cat([batch.mask, torch.zeros(R, 3, dtype=torch.bool)], 1)
    loss, gradient, metrics = whole_batch(batch, whole, bounds, aggregation)
    found = whole_batch(padded, whole, bounds, aggregation)
    agree(found, (loss, torch.cat([gradient, torch.zeros(R, 3)], 1), metrics))
