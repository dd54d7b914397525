"""Which tokens an expert takes: against a plain loop, and over ranks against one process."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.capacity import POLICIES, taken
from tests.distributed import Pool

TOKENS, EXPERTS, TOPK = 24, 4, 2


def routing(seed: int, skew: float = 0.0, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Probabilities [N, E] of the chosen experts and which they are; with ``skew`` expert ``seed``
    is asked for more often."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    logits[:, seed % EXPERTS] += skew
    chosen = logits.topk(TOPK, dim=1).indices
    pending = torch.zeros(tokens, EXPERTS, dtype=torch.bool).scatter(1, chosen, True)
    return logits.masked_fill(~pending, -math.inf).softmax(dim=1), pending


def loop(probs: Tensor, pending: Tensor, factor: float, policy: str) -> Tensor:
    """Each expert goes through the tokens in the order of the policy until it is full."""
    capacity = math.ceil(int(pending.sum()) / EXPERTS * factor)
    kept = torch.zeros_like(pending)
    for expert in range(EXPERTS):
        asking = [token for token in range(len(pending)) if pending[token, expert]]
        if policy == "probs":
            asking.sort(key=lambda token, e=expert: -float(probs[token, e]))
        for token in asking[:capacity]:
            kept[token, expert] = True
    return kept


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("factor", [0.2, 0.5, 1.0, 1.3, 9.0])
def test_like_a_plain_loop(policy: str, factor: float) -> None:
    for seed in range(5):
        probs, pending = routing(seed, skew=2.0)
        kept = taken(probs, pending, TOPK, factor, policy)
        assert torch.equal(kept, loop(probs, pending, factor, policy))


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_probabilities_are_taken_in_order(policy: str) -> None:
    pending = torch.tensor([[True, True, False, False]] * 2000)
    kept = taken(pending * 0.5, pending, TOPK, 1.0, policy)
    assert kept[:1000, :2].all()
    assert not kept[1000:].any()


def test_tokens_that_ask_for_nothing_take_no_room() -> None:
    probs, pending = routing(0)
    pending[::2] = False
    for policy in POLICIES:
        kept = taken(probs, pending, TOPK, 0.5, policy)
        assert torch.equal(kept, loop(probs, pending, 0.5, policy))


def kept_on_rank(policy: str, factor: float, shared: bool) -> Tensor:
    rank = dist.get_rank()
    group = dist.group.WORLD if shared else None
    return taken(*routing(rank, skew=3.0), TOPK, factor, policy, group)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_equal_one_process(
    policy: str, size: int, ranks: Callable[[int], Pool]
) -> None:
    everyones = [routing(rank, 3.0) for rank in range(size)]
    probs, pending = (torch.cat(parts) for parts in zip(*everyones, strict=True))
    for factor in (0.3, 1.0):
        kept = torch.cat(ranks(size).run(kept_on_rank, policy, factor, True))
        assert torch.equal(kept, loop(probs, pending, factor, policy))


@pytest.mark.parametrize("policy", POLICIES)
def test_sharing_drops_fewer(policy: str, ranks: Callable[[int], Pool]) -> None:
    """Each of four ranks overloads another expert; together the load is even."""
    offered = 4 * TOKENS * TOPK
    alone = sum(int(kept.sum()) for kept in ranks(4).run(kept_on_rank, policy, 1.0, False))
    shared = sum(int(kept.sum()) for kept in ranks(4).run(kept_on_rank, policy, 1.0, True))
    assert 1 - alone / offered > 0.2
    assert 1 - shared / offered < 0.06


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_on_a_cuda_device(policy: str) -> None:
    probs, pending = routing(0, skew=2.0, tokens=4096)
    kept = taken(probs.cuda(), pending.cuda(), TOPK, 0.8, policy)
    assert torch.equal(kept.cpu(), taken(probs, pending, TOPK, 0.8, policy))
