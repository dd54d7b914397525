"""Lightning attention over cut rows against the whole row in one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from kernels.lightning import lightning_attention, lightning_attention_qkv
from parallel.cut import Cut
from parallel.exchange import counted
from parallel.lasp import Exchange, Lasp, gather_states
from parallel.lasp_ring import pass_states
from parallel.layout import CUTS
from parallel.state_plan import StatePlan
from tests.distributed import Pool
from tests.parallel.rows import LENGTHS, borders

HEADS, WIDTH = 2, 8
DECAY = torch.tensor([0.7, 0.02])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def whole_row(tokens: int, fused: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v (or all in one) of a row and the gradient of the output, the same on every rank."""
    random = torch.Generator().manual_seed(tokens)
    widths = [3 * WIDTH] if fused else [WIDTH] * 3
    return [
        torch.randn(1, tokens, HEADS, width, generator=random).to(dtype) / 2
        for width in [*widths, WIDTH]
    ]


def error(cut: Cut, fused: bool, exchange: Exchange, dtype: torch.dtype) -> float:
    """The largest error of this rank's output and gradients."""
    rank = dist.get_rank()
    *inputs, d_o = whole_row(cut.bounds[-1], fused, dtype)
    local = [cut.take(x, rank, dim=1).requires_grad_() for x in inputs]
    lasp = Lasp.begin(
        *local,
        decay=DECAY,
        plan=StatePlan.of(cut, rank),
        group=dist.group.WORLD,
        silu=fused,
        exchange=exchange,
    )
    o = lasp.finish()
    o.backward(cut.take(d_o, rank, dim=1))

    inputs = [x.requires_grad_() for x in inputs]
    bounds = torch.tensor(cut.bounds, dtype=torch.int32)
    whole = lightning_attention_qkv if fused else lightning_attention
    expected = whole(*inputs, DECAY, cu_seqlens=bounds, silu=fused, backend="portable")
    expected.backward(d_o)
    grads = [(mine.grad, x.grad) for mine, x in zip(local, inputs, strict=True)]
    return max(
        float((mine - cut.take(whole, rank, dim=1)).abs().max().nan_to_num(torch.inf))
        for mine, whole in [(o, expected), *grads]
    )


def too_large(fused: bool, exchange: Exchange) -> list[tuple[Any, ...]]:
    """The cases in which this rank's error exceeds its tolerance."""
    size = dist.get_world_size()
    cases = itertools.product(LENGTHS, CUTS, TOLERANCE.items())
    errors = {
        (name, kind, dtype, bound): error(Cut.of(borders(name), size, kind), fused, exchange, dtype)
        for name, kind, (dtype, bound) in cases
    }
    return [(*case, error) for case, error in errors.items() if error > case[-1]]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_cut_rows_attend_as_whole_ones(
    size: int, fused: bool, ranks: Callable[[int], Pool]
) -> None:
    assert ranks(size).run(too_large, fused, gather_states) == [[]] * size


def test_states_passed_one_by_one_arrive_the_same(ranks: Callable[[int], Pool]) -> None:
    assert ranks(4).run(too_large, False, pass_states) == [[]] * 4


def sent(bounds: list[int], kind: str, exchange: Exchange) -> tuple[int, int]:
    """Messages and bytes of this rank in a forward and a backward pass."""
    rank, cut = dist.get_rank(), Cut.of(bounds, dist.get_world_size(), kind)
    *inputs, d_o = whole_row(cut.bounds[-1], False, torch.float32)
    local = [cut.take(x, rank, dim=1).requires_grad_() for x in inputs]
    with counted() as traffic:
        lasp = Lasp.begin(
            *local,
            decay=DECAY,
            plan=StatePlan.of(cut, rank),
            group=dist.group.WORLD,
            exchange=exchange,
        )
        lasp.finish().backward(cut.take(d_o, rank, dim=1))
    return traffic.messages, traffic.bytes


def sent_in(cases: list[tuple[list[int], str, Exchange]]) -> list[tuple[int, int]]:
    return [sent(*case) for case in cases]


def test_bytes_do_not_grow_with_the_row(ranks: Callable[[int], Pool]) -> None:
    state = HEADS * WIDTH * WIDTH * 4
    cases = [
        ([0, tokens], kind, gather_states)
        for kind in ("contiguous", "zigzag")
        for tokens in (16, 512)
    ]
    one, two = (6, 6 * state), (6, 12 * state)
    assert ranks(4).run(sent_in, cases) == [[one, one, two, two]] * 4
    in_a_row = ranks(4).run(sent, [0, 512], "contiguous", pass_states)
    assert in_a_row == [(1, state), (2, 2 * state), (2, 2 * state), (1, state)]


def test_documents_on_one_rank_cost_no_messages(ranks: Callable[[int], Pool]) -> None:
    cases = [(borders(name), "balanced", gather_states) for name in ("all_local", "one_token_each")]
    assert ranks(2).run(sent_in, cases) == [[(0, 0)] * 2] * 2


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("name", LENGTHS)
def test_states_are_held_for_segments_of_cut_documents_alone(name: str, kind: str) -> None:
    cut = Cut.of(borders(name), 4, kind)
    for rank in range(4):
        plan = StatePlan.of(cut, rank)
        segments = [s for one in plan.stretches for s in range(one.first, one.last)]
        assert segments == list(range(len(plan.bounds) - 1))
        alone = [plan.tokens(one.first, one.last) for one in plan.stretches if one.is_cut]
        spans = [span for spans in cut.crossings for span in spans if span.rank == rank]
        assert alone == sorted((span.local for span in spans), key=lambda part: part.start)
        assert len(alone) <= 2 * len(cut.of_rank(rank))
        # The others are as few calls as they can be.
        together = [one.is_cut for one in plan.stretches]
        assert (False, False) not in itertools.pairwise(together)


class Noted(torch.autograd.Function):
    """The identity, which notes when it is computed."""

    @staticmethod
    def forward(ctx, x, events, name):
        ctx.note = lambda: events.append(name)
        ctx.note()
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        ctx.note()
        return dx, None, None


def order_of_events() -> list[str]:
    """What happens when, in a layer that computes a gate while states are under way."""
    events: list[str] = []

    def exchange(sums, sent, decay, group):
        events.append("depart")
        arrive = gather_states(sums, sent, decay, group)

        def arrived():
            events.append("arrive")
            return arrive()

        return arrived

    rank, cut = dist.get_rank(), Cut.of([0, 16], dist.get_world_size())
    *heads, d_o = (cut.take(x, rank, dim=1) for x in whole_row(16, False, torch.float32))
    hidden = torch.ones_like(d_o, requires_grad=True)
    heads = [x * hidden for x in heads]
    lasp = Lasp.begin(
        *heads,
        decay=DECAY,
        plan=StatePlan.of(cut, rank),
        group=dist.group.WORLD,
        exchange=exchange,
    )
    gate = Noted.apply(hidden, events, "gate")
    (lasp.finish() * gate).backward(d_o)
    return events


def test_the_gate_is_computed_while_states_are_under_way(ranks: Callable[[int], Pool]) -> None:
    for events in ranks(2).run(order_of_events):
        assert events == ["depart", "gate", "arrive"] * 2


def recomputed() -> bool:
    """Whether gradients through a recomputed layer are those without."""
    rank, cut = dist.get_rank(), Cut.of(borders("giant_last"), dist.get_world_size())
    qkv, d_o = (cut.take(x, rank, dim=1) for x in whole_row(48, True, torch.float32))
    qkv.requires_grad_()

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        plan, group = StatePlan.of(cut, rank), dist.group.WORLD
        return Lasp.begin(qkv, decay=DECAY, plan=plan, group=group, silu=True).finish()

    (plain,) = torch.autograd.grad(attend(qkv), qkv, d_o)
    for reentrant in (True, False):
        qkv.grad = None
        checkpoint(attend, qkv, use_reentrant=reentrant).backward(d_o)
        if not torch.equal(qkv.grad, plain):
            return False
    with torch.no_grad():
        return not attend(qkv).requires_grad


def test_recomputation_gives_the_same_gradients(ranks: Callable[[int], Pool]) -> None:
    assert ranks(2).run(recomputed) == [True, True]
