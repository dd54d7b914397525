"""The exchange of tokens with the ranks of their experts, overlapped with the experts' work.

The tokens of a rank are divided in parts. Each part is sent to its experts (all-to-all over the
expert-parallel ranks ep), spread over the ranks that hold columns of the same expert (all-gather
over etp), computed, summed (reduce-scatter over etp) and sent back (all-to-all over ep). While one
part computes, the others travel (MiniMax-01, arXiv 2501.08313, section 3.1, EP-ETP overlap):

    part 0   send   gather  compute  sum     back
    part 1          send    gather   compute sum    back
    part 2                  send     gather  compute ...

Messages of one process group start in the same order on every rank. The backward pass goes through
the same turns from the last to the first, since autograd takes the youngest node that is ready:
what was started is then awaited, what was awaited is started, and it overlaps as much.

Gathering and summing are all-to-alls too: of as many copies of a part as there are etp ranks, and
of its partial results, which are then added in FP32 in the order of the ranks. They take rows of
uneven number on every backend and send what a ring would.

Shapes: N tokens of this rank, A assignments (a token and one of its experts), P parts, E experts of
which this rank holds L, C width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
# (rows [A, C] in the order of the experts, tokens of each expert [L] in host memory, probs [A])
# -> [A, C], which over etp is still to be summed.
ComputeExperts = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExpertGroups:
    """ep: ranks with other experts; etp: ranks with other columns of the same experts; both: all of
    them, etp ranks side by side."""

    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    both: dist.ProcessGroup


def exchange_and_compute(
    hidden_NC: Tensor,
    probs_NE: Tensor,
    routing_NE: Tensor,
    experts: ComputeExperts,
    groups: ExpertGroups,
    parts: int,
) -> Tensor:
    """The experts' answers to this rank's tokens, summed for each token: [N, C]. Collective.

    Args:
        probs_NE: weights of the answers, which ``experts`` applies.
        routing_NE: bool, which experts a token is sent to.
        parts: the same on all ranks; tokens that do not divide leave later parts one shorter.
    """
    pairs = zip(hidden_NC.tensor_split(parts), probs_NE.tensor_split(parts), strict=True)
    routes = _routes(routing_NE, groups, parts)
    return torch.cat(
        in_turns(
            [
                _one_part(hidden, probs, route, experts, groups)
                for (hidden, probs), route in zip(pairs, routes, strict=True)
            ]
        )
    )


def in_turns(parts: Sequence[Generator[None, None, Result]]) -> list[Result]:
    """Run generators side by side, each one step behind the one before it, for their results.

    A step ends where a message has been started. In a turn the last part goes first: what it starts
    is under way while an earlier part computes.
    """
    waiting = list(enumerate(parts))
    running: list[tuple[int, Generator[None, None, Result]]] = []
    results: dict[int, Result] = {}
    while waiting or running:
        running = [*waiting[:1], *running]
        waiting = waiting[1:]
        for number, part in running:
            try:
                next(part)
            except StopIteration as end:
                results[number] = end.value
        running = [(number, part) for number, part in running if number not in results]
    return [results[number] for number in range(len(parts))]


class RoundTrip:
    """Rows that travel in one all-to-all, and their gradients that travel back.

    ``start`` begins and ``finish`` waits; in the backward pass ``finish`` begins and ``start``
    waits. Work put in between overlaps, in both directions.
    """

    def __init__(
        self, group: dist.ProcessGroup, received: Sequence[int], sent: Sequence[int]
    ) -> None:
        """received, sent: rows from and to each rank of the group."""
        self._group = group
        self._received, self._sent = list(received), list(sent)
        self._tickets: tuple[Tensor, ...] = ()
        self._messages: list[tuple[dist.Work, Tensor, Tensor]] = []

    def start(self, *rows: Tensor) -> RoundTrip:
        """Send tensors of [sum(sent), ...]."""
        self._tickets = _Start.apply(self, *rows)
        return self

    def finish(self) -> tuple[Tensor, ...]:
        """What arrived: [sum(received), ...] for each tensor sent."""
        tickets, self._tickets = self._tickets, ()
        return _Finish.apply(self, *tickets)

    def depart(self, rows: Sequence[Tensor], back: bool) -> None:
        received, sent = self._received, self._sent
        if back:
            received, sent = sent, received
        for row in rows:
            row = row.contiguous()
            landed = row.new_empty(sum(received), *row.shape[1:])
            work = dist.all_to_all_single(
                landed, row, received, sent, group=self._group, async_op=True
            )
            # The rows must live until they have been sent.
            self._messages.append((work, row, landed))

    def land(self) -> tuple[Tensor, ...]:
        messages, self._messages = self._messages, []
        for work, _, _ in messages:
            work.wait()
        return tuple(landed for _, _, landed in messages)


class _Start(torch.autograd.Function):
    """Gives tickets for ``_Finish``: tensors without storage, in the shape of the rows, so that the
    gradients which ``_Finish`` has yet to receive have a place in the graph."""

    @staticmethod
    def forward(ctx: Any, trip: RoundTrip, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        trip.depart(rows, back=False)
        return tuple(_ticket(row, row.shape) for row in rows)

    @staticmethod
    def backward(ctx: Any, *tickets: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.trip.land()


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: RoundTrip, *tickets: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        ctx.shapes = [ticket.shape for ticket in tickets]
        return trip.land()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.trip.depart(gradients, back=True)
        return None, *map(_ticket, gradients, ctx.shapes)


def _ticket(like: Tensor, shape: torch.Size) -> Tensor:
    return like.new_zeros(()).expand(shape)


@dataclass(frozen=True)
class _Route:
    """Where the assignments of one part go.

    Attributes:
        tokens, entries: [A] each assignment's token, and its place in the flattened probabilities,
            in the order of the experts.
        sent, received: assignments to and from each ep rank.
        gathered: assignments that each etp rank holds after the exchange.
        chunks: [etp * ep * L] assignments by etp rank, ep rank and local expert that they come from
            and go to, as they lie after gathering.
        local_experts: L.
    """

    tokens: Tensor
    entries: Tensor
    sent: list[int]
    received: list[int]
    gathered: list[int]
    chunks: list[int]
    local_experts: int

    @property
    def tokens_per_expert(self) -> Tensor:
        return torch.tensor(self.chunks).view(-1, self.local_experts).sum(dim=0)

    def by_expert(self, rows: Tensor) -> Tensor:
        """From the order of the ranks to that of the local experts."""
        return self._transposed(rows, self.chunks, self.local_experts)

    def by_rank(self, rows: Tensor) -> Tensor:
        """Back to the order of the ranks."""
        sizes = torch.tensor(self.chunks).view(-1, self.local_experts).T
        return self._transposed(rows, sizes.flatten().tolist(), sizes.shape[1])

    def _transposed(self, rows: Tensor, sizes: list[int], columns: int) -> Tensor:
        if self.local_experts == 1:
            return rows
        chunks = rows.split(sizes)
        return torch.cat([chunk for first in range(columns) for chunk in chunks[first::columns]])


def _routes(routing_NE: Tensor, groups: ExpertGroups, parts: int) -> list[_Route]:
    """The routes of all parts, with one gathering of counts and before anything is under way, so
    that no part waits for the host."""
    tokens, experts = routing_NE.shape
    ep, etp = groups.ep.size(), groups.etp.size()
    local = experts // ep
    sizes = [len(part) for part in torch.arange(tokens).tensor_split(parts)]
    part_N = torch.arange(parts).repeat_interleave(torch.tensor(sizes)).to(routing_NE.device)
    counts_PE = routing_NE.new_zeros(parts, experts, dtype=torch.int64)
    counts_PE.index_add_(0, part_N, routing_NE.long())

    everyones = counts_PE.new_empty(ep * etp, parts, experts)
    dist.all_gather_into_tensor(everyones, counts_PE[None], group=groups.both)
    first = groups.ep.rank() * local
    mine = everyones.view(ep, etp, parts, experts)[..., first : first + local]
    both = torch.cat([counts_PE.flatten(), mine.flatten()]).cpu()
    counts_PE, mine = both[: parts * experts].view(parts, ep, local), both[parts * experts :]
    incoming = mine.view(ep, etp, parts, local).permute(2, 1, 0, 3)  # [P, etp, ep, L]

    expert_A, token_A = routing_NE.T.nonzero().unbind(dim=1)
    order = part_N[token_A].argsort(stable=True)
    expert_A, token_A = expert_A[order], token_A[order]
    starts = torch.tensor([0, *sizes]).cumsum(0).to(routing_NE.device)
    token_A = token_A - starts[part_N[token_A]]
    lengths = counts_PE.sum(dim=(1, 2)).tolist()
    return [
        _Route(
            tokens=own_tokens,
            entries=own_tokens * experts + own_experts,
            sent=counts_PE[part].sum(dim=1).tolist(),
            received=incoming[part, groups.etp.rank()].sum(dim=1).tolist(),
            gathered=incoming[part].sum(dim=(1, 2)).tolist(),
            chunks=incoming[part].flatten().tolist(),
            local_experts=local,
        )
        for part, (own_tokens, own_experts) in enumerate(
            zip(token_A.split(lengths), expert_A.split(lengths), strict=True)
        )
    ]


def _one_part(
    hidden_NC: Tensor,
    probs_NE: Tensor,
    route: _Route,
    experts: ComputeExperts,
    groups: ExpertGroups,
) -> Generator[None, None, Tensor]:
    """One part on its way: [N, C] of this part's tokens. Yields whenever a message is under way."""
    rows = hidden_NC.index_select(0, route.tokens)
    probs = probs_NE.flatten().index_select(0, route.entries)
    trip = RoundTrip(groups.ep, route.received, route.sent).start(rows, probs)
    yield
    rows, probs = trip.finish()

    shares = groups.etp.size()
    if shares > 1:
        copies = [len(rows)] * shares
        trip = RoundTrip(groups.etp, route.gathered, copies)
        trip.start(rows.repeat(shares, 1), probs.repeat(shares))
        yield
        rows, probs = trip.finish()
    answers = experts(route.by_expert(rows), route.tokens_per_expert, route.by_expert(probs))
    answers = route.by_rank(answers)
    if shares > 1:
        trip = RoundTrip(groups.etp, copies, route.gathered).start(answers)
        yield
        (partial,) = trip.finish()
        partial = partial.view(shares, -1, partial.shape[-1])
        wide = torch.promote_types(partial.dtype, torch.float32)
        answers = partial.sum(dim=0, dtype=wide).to(partial.dtype)

    trip = RoundTrip(groups.ep, route.sent, route.received).start(answers)
    yield
    (answers,) = trip.finish()
    return torch.zeros_like(hidden_NC).index_add(0, route.tokens, answers)
