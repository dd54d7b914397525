"""Softmax attention over cut rows against the whole row in one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kernels.attention import varlen_attention
from parallel import varlen_ring
from parallel.cut import Cut
from parallel.exchange import Transfer, counted
from parallel.gathered_attention import gathered_attention
from parallel.layout import CUTS
from parallel.ring_plan import RingPlan
from parallel.varlen_ring import ring_attention
from tests.distributed import Pool
from tests.parallel.rows import LENGTHS, borders

HEADS, GROUPS, WIDTH = 4, 2, 8
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def ring(q, k, v, cut: Cut) -> torch.Tensor:
    return ring_attention(q, k, v, RingPlan.of(cut, dist.get_rank()), dist.group.WORLD)


def gathered(q, k, v, cut: Cut) -> torch.Tensor:
    return gathered_attention(q, k, v, cut, dist.group.WORLD)


def whole_row(tokens: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k and v of a row and the gradient of the output, the same on every rank."""
    random = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    *inputs, d_out = (torch.randn(*shape, generator=random).to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in inputs], d_out


def error(cut: Cut, attend: Callable[..., Any], dtype: torch.dtype) -> float:
    """The largest error of this rank's output and gradients."""
    rank = dist.get_rank()
    inputs, d_out = whole_row(cut.bounds[-1], dtype)
    local = [cut.take(x.detach(), rank).requires_grad_() for x in inputs]
    out = attend(*local, cut)
    out.backward(cut.take(d_out, rank))

    bounds = torch.tensor(cut.bounds, dtype=torch.int32)
    expected, _ = varlen_attention(*inputs, bounds, backend="reference")
    expected.backward(d_out)
    grads = [(mine.grad, x.grad) for mine, x in zip(local, inputs, strict=True)]
    return max(
        float((mine - cut.take(whole, rank)).abs().max().nan_to_num(torch.inf))
        for mine, whole in [(out, expected), *grads]
    )


def too_large(attend: Callable[..., Any]) -> list[tuple[Any, ...]]:
    """The cases in which this rank's error exceeds its tolerance."""
    size = dist.get_world_size()
    cases = itertools.product(LENGTHS, CUTS, TOLERANCE.items())
    errors = {
        (name, kind, dtype, bound): error(Cut.of(borders(name), size, kind), attend, dtype)
        for name, kind, (dtype, bound) in cases
    }
    return [(*case, error) for case, error in errors.items() if error > case[-1]]


@pytest.mark.parametrize("attend", [ring, gathered])
@pytest.mark.parametrize("size", [2, 4])
def test_cut_rows_attend_as_whole_ones(
    size: int, attend: Callable[..., Any], ranks: Callable[[int], Pool]
) -> None:
    assert ranks(size).run(too_large, attend) == [[]] * size


def sent(name: str, kind: str) -> tuple[int, int, int, int]:
    """Bytes that this rank sends forward and backward; keys that its plan sends and sees."""
    cut = Cut.of(borders(name), dist.get_world_size(), kind)
    rank = dist.get_rank()
    inputs, d_out = whole_row(cut.bounds[-1], torch.float32)
    local = [cut.take(x.detach(), rank).requires_grad_() for x in inputs]
    with counted() as forward:
        out = ring(*local, cut)
    with counted() as backward:
        out.backward(cut.take(d_out, rank))
    plan = RingPlan.of(cut, rank)
    return (
        forward.bytes,
        backward.bytes,
        sum(step.sent for step in plan.steps),
        sum(step.incoming for step in plan.steps),
    )


def sent_in(cases: list[tuple[str, str]]) -> list[tuple[int, int, int, int]]:
    return [sent(name, kind) for name, kind in cases]


def test_bytes_are_those_of_the_keys_that_others_need(ranks: Callable[[int], Pool]) -> None:
    key_and_value = 2 * GROUPS * WIDTH * 4
    for cases in ranks(4).run(sent_in, [("skewed", "zigzag"), ("one_document", "balanced")]):
        for forward, backward, keys_sent, keys_seen in cases:
            assert forward == keys_sent * key_and_value
            assert backward == (keys_sent + keys_seen) * key_and_value


def test_documents_on_one_rank_cost_no_messages(ranks: Callable[[int], Pool]) -> None:
    cases = [("all_local", "balanced"), ("one_token_each", "balanced")]
    assert ranks(4).run(sent_in, cases) == [[(0, 0, 0, 0)] * 2] * 4


def order_of_events() -> list[str]:
    """What happens when, in a forward pass over four ranks that share one document."""
    events: list[str] = []

    def noted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return call

    rank, cut = dist.get_rank(), Cut.of([0, 64], dist.get_world_size())
    inputs, _ = whole_row(64, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        for module, name, event in (
            (varlen_ring, "swap", "depart"),
            (Transfer, "wait", "arrive"),
            (varlen_ring, "attend_segments", "own"),
            (varlen_ring, "attend_rectangles", "compute"),
        ):
            patch.setattr(module, name, noted(getattr(module, name), event))
        ring(*(cut.take(x.detach(), rank) for x in inputs), cut)
    return events


def test_the_next_keys_travel_while_a_rank_computes(ranks: Callable[[int], Pool]) -> None:
    step = ["arrive", "depart", "compute"]
    for events in ranks(4).run(order_of_events):
        assert events == ["depart", "own", "compute", *step, *step, "arrive", "compute"]
