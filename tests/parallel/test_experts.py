"""The exchange with the ranks of the experts, against experts that are all in one process."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import host
from parallel.experts import AllToAll, ExpertGroups, exchange_and_compute, in_turns
from parallel.layout import Layout
from tests.distributed import Pool

EXPERTS, WIDTH, COLUMNS, TOPK = 4, 6, 8, 2


def test_a_part_is_one_step_behind_the_part_before() -> None:
    steps: list[str] = []

    def part(name: str) -> Generator[None, None, str]:
        for step in range(3):
            steps.append(f"{name}{step}")
            if step < 2:
                yield
        return name

    assert in_turns([part(name) for name in "abc"]) == ["a", "b", "c"]
    assert steps == ["a0", "b0", "a1", "c0", "b1", "a2", "c1", "b2", "c2"]


class Marked(torch.autograd.Function):
    """Doubles, and writes down when it does so and when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        events.append("compute")
        return 2 * tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.events.append("compute")
        return 2 * gradient, None


def test_both_passes_compute_while_messages_travel(
    monkeypatch: pytest.MonkeyPatch, single_process: Layout
) -> None:
    events: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        method = getattr(AllToAll, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return method(*args, **kwargs)

        return call

    for name in ("send", "receive"):
        monkeypatch.setattr(AllToAll, name, watched(name))
    world = dist.group.WORLD
    output = exchange_and_compute(
        *tokens_of(0, 12),
        lambda rows, counts, probs: Marked.apply(rows, events),
        ExpertGroups(world, world, world),
        parts=3,
    )
    forward = events.copy()
    events.clear()
    output.sum().backward()
    assert forward == [
        *("send", "send", "receive", "compute", "send"),
        *("send", "receive", "compute", "send", "receive"),
        *("receive", "compute", "send", "receive", "receive"),
    ]
    swapped = {"send": "receive", "receive": "send", "compute": "compute"}
    assert events == [swapped[event] for event in reversed(forward)]


def weights() -> tuple[Tensor, Tensor]:
    """[E, C, F] and [E, F, C]."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(EXPERTS, WIDTH, COLUMNS, generator=generator, dtype=torch.float64)
    second = torch.randn(EXPERTS, COLUMNS, WIDTH, generator=generator, dtype=torch.float64)
    return first, second


def tokens_of(rank: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, probabilities and routing: nothing to expert 1, the first token nowhere."""
    generator = torch.Generator().manual_seed(10 + rank)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    logits = torch.randn(tokens, EXPERTS, generator=generator, dtype=torch.float64)
    logits[:, 1] = -100
    routing = torch.zeros(tokens, EXPERTS, dtype=torch.bool)
    routing.scatter_(1, logits.topk(TOPK, dim=1).indices, True)
    routing[0] = False
    return hidden.requires_grad_(), logits.softmax(dim=1).requires_grad_(), routing


def whole(rank: int, tokens: int) -> dict[str, Tensor]:
    """Every expert asked about every token, and weighted by zero where it is not sent there."""
    first, second = (weight.requires_grad_() for weight in weights())
    hidden, probs, routing = tokens_of(rank, tokens)
    answers = torch.einsum("nc,ecf->nef", hidden, first).sin()
    output = torch.einsum("nef,efc,ne->nc", answers, second, probs * routing)
    return gradients(output, hidden, probs, first, second)


def gradients(output: Tensor, *leaves: Tensor) -> dict[str, Tensor]:
    output.cos().sum().backward()
    names = ("hidden", "probs", "first", "second")
    return {
        "output": output.detach(),
        **{n: leaf.grad for n, leaf in zip(names, leaves, strict=True)},
    }


def exchanged(ep: int, etp: int, tokens: int, parts: int) -> dict[str, Tensor]:
    """The same with experts over ep x etp = all ranks."""
    rank = dist.get_rank()
    ep_rank, etp_rank = divmod(rank, etp)
    grid = torch.arange(ep * etp).view(ep, etp)
    eps = [dist.new_group(column) for column in grid.T.tolist()]
    etps = [dist.new_group(row) for row in grid.tolist()]
    groups = ExpertGroups(eps[etp_rank], etps[ep_rank], dist.group.WORLD)
    first, second = (weight.chunk(ep)[ep_rank] for weight in weights())
    first = first.chunk(etp, dim=2)[etp_rank].clone().requires_grad_()
    second = second.chunk(etp, dim=1)[etp_rank].clone().requires_grad_()

    def experts(rows: Tensor, counts: Tensor, probs: Tensor) -> Tensor:
        sizes = counts.tolist()
        answers = [
            (row @ w1).sin() @ w2
            for row, w1, w2 in zip(rows.split(sizes), first, second, strict=True)
        ]
        return torch.cat(answers) * probs[:, None]

    hidden, probs, routing = tokens_of(rank, tokens)
    output = exchange_and_compute(hidden, probs, routing, experts, groups, parts)
    return gradients(output, hidden, probs, first, second)


@pytest.mark.parametrize(("ep", "etp"), [(2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize(("tokens", "parts"), [(12, 1), (13, 3), (2, 5)])
def test_like_experts_in_one_process(
    ep: int, etp: int, tokens: int, parts: int, ranks: Callable[[int], Pool]
) -> None:
    results = ranks(ep * etp).run(exchanged, ep, etp, tokens, parts)
    expected = [whole(rank, tokens) for rank in range(ep * etp)]
    first, second = (sum(one[name] for one in expected) for name in ("first", "second"))
    for rank, (found, one) in enumerate(zip(results, expected, strict=True)):
        ep_rank, etp_rank = divmod(rank, etp)
        one["first"] = first.chunk(ep)[ep_rank].chunk(etp, dim=2)[etp_rank]
        one["second"] = second.chunk(ep)[ep_rank].chunk(etp, dim=1)[etp_rank]
        for name, tensor in one.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-10, msg=name)


def scaled_by_expert(device: torch.device) -> tuple[Tensor, Tensor]:
    """Outputs and gradients of BF16 tokens of which three experts give 256, 1 and 1 times each."""
    hidden = torch.ones(5, WIDTH, dtype=torch.bfloat16, device=device, requires_grad=True)
    routing = torch.tensor([[True, False, True, True]], device=device).expand(5, EXPERTS).clone()
    routing[2, 0] = False  # a token with fewer experts
    scale = torch.tensor([256.0, 0.0, 1.0, 1.0], dtype=torch.bfloat16, device=device)

    def experts(rows: Tensor, counts: Tensor, probs: Tensor) -> Tensor:
        return rows * scale.repeat_interleave(counts.to(device))[:, None]

    world = dist.group.WORLD
    groups = ExpertGroups(world, world, world)
    output = exchange_and_compute(hidden, routing.bfloat16(), routing, experts, groups, parts=2)
    output.backward(torch.ones_like(output))
    return output.detach(), hidden.grad


def test_answers_are_added_in_float32(single_process: Layout) -> None:
    """In BF16, 256 + 1 is 256."""
    for sums in scaled_by_expert(host.device()):
        assert sums[:, 0].tolist() == [258.0, 258.0, 2.0, 258.0, 258.0]


@pytest.mark.gpu
def test_equal_inputs_give_equal_bits(single_process: Layout) -> None:
    torch.manual_seed(0)
    tokens = 4096
    hidden = torch.randn(tokens, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    probs = torch.rand(tokens, 8, device="cuda")
    routing = torch.zeros_like(probs, dtype=torch.bool)
    routing.scatter_(1, probs.topk(6, dim=1).indices, True)
    world = dist.group.WORLD

    def run() -> tuple[Tensor, Tensor]:
        output = exchange_and_compute(
            hidden,
            probs,
            routing,
            lambda rows, counts, probs: rows * probs[:, None].bfloat16(),
            ExpertGroups(world, world, world),
            parts=2,
        )
        return output.detach(), *torch.autograd.grad(output, hidden, output.detach())

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
