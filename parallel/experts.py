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

Shapes: N tokens of this rank (of a part), A assignments (a token and one of its experts), at most K
of a token, P parts, E experts of which this rank holds L, C width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.exchange import Transfer, all_gather, all_to_all

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


class AllToAll:
    """Rows that travel in one all-to-all, and their gradients that travel back.

    ``start`` sends and ``finish`` waits; in the backward pass ``finish`` sends and ``start`` waits.
    Work put in between overlaps, in both directions.
    """

    def __init__(
        self, group: dist.ProcessGroup, received: Sequence[int], sent: Sequence[int]
    ) -> None:
        """received, sent: rows from and to each rank of the group."""
        self._group = group
        self._received, self._sent = list(received), list(sent)
        self._placeholders: tuple[Tensor, ...] = ()
        self._under_way: list[Transfer] = []

    def start(self, *rows: Tensor) -> AllToAll:
        """Send tensors of [sum(sent), ...]."""
        self._placeholders = _Start.apply(self, *rows)
        return self

    def finish(self) -> tuple[Tensor, ...]:
        """What arrived: [sum(received), ...] for each tensor sent."""
        placeholders, self._placeholders = self._placeholders, ()
        return _Finish.apply(self, *placeholders)

    def send(self, rows: Sequence[Tensor], back: bool) -> None:
        received, sent = self._received, self._sent
        if back:
            received, sent = sent, received
        self._under_way = [all_to_all(self._group, row, received, sent) for row in rows]

    def receive(self) -> tuple[Tensor, ...]:
        under_way, self._under_way = self._under_way, []
        return tuple(transfer.wait() for transfer in under_way)


class _Start(torch.autograd.Function):
    """Returns placeholders for ``_Finish``: tensors without storage, in the shape of the rows, so
    that the gradients which ``_Finish`` has yet to receive have a place in the graph."""

    @staticmethod
    def forward(ctx: Any, exchange: AllToAll, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        exchange.send(rows, back=False)
        return tuple(_placeholder(row, row.shape) for row in rows)

    @staticmethod
    def backward(ctx: Any, *placeholders: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.receive()


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: AllToAll, *placeholders: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        ctx.shapes = [placeholder.shape for placeholder in placeholders]
        return exchange.receive()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.send(gradients, back=True)
        return None, *map(_placeholder, gradients, ctx.shapes)


def _placeholder(like: Tensor, shape: torch.Size) -> Tensor:
    return like.new_zeros(()).expand(shape)


@dataclass(frozen=True)
class _Route:
    """Where the assignments of one part go.

    Attributes:
        tokens, entries: [A] each assignment's token, and its place in the flattened probabilities,
            in the order of the experts.
        places_NK: each token's assignments in that order, A where it has fewer than K.
        sent, received: assignments to and from each ep rank.
        gathered: assignments that each etp rank holds after the exchange.
        chunks: [etp * ep * L] assignments by etp rank, ep rank and local expert that they come from
            and go to, as they lie after gathering.
        local_experts: L.
    """

    tokens: Tensor
    entries: Tensor
    places_NK: Tensor
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
    """The routes of all parts. The host waits for the device once, before anything is under way."""
    experts = routing_NE.shape[1]
    ep, etp = groups.ep.size(), groups.etp.size()
    local = experts // ep
    routing_P = routing_NE.tensor_split(parts)
    counts_PE = torch.stack([part.sum(dim=0) for part in routing_P])
    everyones = all_gather(groups.both, counts_PE).wait()
    first = groups.ep.rank() * local
    mine = everyones.view(ep, etp, parts, experts)[..., first : first + local]
    most = routing_NE.sum(dim=1).max()
    host = torch.cat([counts_PE.flatten(), mine.flatten(), most[None]]).cpu()
    counts_PE = host[: parts * experts].view(parts, ep, local)
    incoming = host[parts * experts : -1].view(ep, etp, parts, local)
    incoming = incoming.permute(2, 1, 0, 3)  # [P, etp, ep, L]
    return [
        _Route(
            *_assignments(part_NE, int(counts_PE[part].sum()), int(host[-1])),
            sent=counts_PE[part].sum(dim=1).tolist(),
            received=incoming[part, groups.etp.rank()].sum(dim=1).tolist(),
            gathered=incoming[part].sum(dim=(1, 2)).tolist(),
            chunks=incoming[part].flatten().tolist(),
            local_experts=local,
        )
        for part, part_NE in enumerate(routing_P)
    ]


def _assignments(routing_NE: Tensor, number: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """`_Route`'s tokens, entries and places of `number` assignments, at most `most` of a token."""
    tokens, experts = routing_NE.shape
    place_EN = routing_NE.T.flatten().cumsum(dim=0).view(experts, tokens) - 1
    place_NE = torch.where(routing_NE, place_EN.T, number)
    entries = torch.arange(tokens * experts, device=routing_NE.device)
    # What is not routed is written to one more place.
    entries = entries.new_empty(number + 1).scatter_(0, place_NE.flatten(), entries)[:number]
    places_NK = place_NE.topk(most, dim=1, largest=False).values
    return entries // experts, entries, places_NK


class _Dispatch(torch.autograd.Function):
    """The rows of tokens for each of their assignments; gradients are summed as `_Combine` does."""

    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return hidden_NC.index_select(0, route.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows_AC: Tensor) -> tuple[Tensor, None]:
        return _sum_of_assignments(d_rows_AC, ctx.route.places_NK), None


class _Combine(torch.autograd.Function):
    """The sum of each token's assignments, in FP32 and in the order of the experts: without atomic
    additions, so that equal inputs give equal bits."""

    @staticmethod
    def forward(ctx: Any, answers_AC: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return _sum_of_assignments(answers_AC, route.places_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_NC: Tensor) -> tuple[Tensor, None]:
        return d_out_NC.index_select(0, ctx.route.tokens), None


def _sum_of_assignments(rows_AC: Tensor, places_NK: Tensor) -> Tensor:
    wide = torch.promote_types(rows_AC.dtype, torch.float32)
    total_NC = rows_AC.new_zeros(len(places_NK), rows_AC.shape[1], dtype=wide)
    if not len(rows_AC):
        return total_NC.to(rows_AC.dtype)
    missing_NK = places_NK == len(rows_AC)
    places_NK = places_NK.clamp(max=len(rows_AC) - 1)
    for place_N, missing_N in zip(places_NK.T, missing_NK.T, strict=True):
        part_NC = rows_AC.index_select(0, place_N)
        total_NC += part_NC.masked_fill_(missing_N[:, None], 0)
    return total_NC.to(rows_AC.dtype)


def _one_part(
    hidden_NC: Tensor,
    probs_NE: Tensor,
    route: _Route,
    experts: ComputeExperts,
    groups: ExpertGroups,
) -> Generator[None, None, Tensor]:
    """One part on its way: [N, C] of this part's tokens. Yields whenever a message is under way."""
    rows = _Dispatch.apply(hidden_NC, route)
    probs = probs_NE.flatten().index_select(0, route.entries)
    exchange = AllToAll(groups.ep, route.received, route.sent).start(rows, probs)
    yield
    rows, probs = exchange.finish()

    shares = groups.etp.size()
    if shares > 1:
        copies = [len(rows)] * shares
        exchange = AllToAll(groups.etp, route.gathered, copies)
        exchange.start(rows.repeat(shares, 1), probs.repeat(shares))
        yield
        rows, probs = exchange.finish()
    answers = experts(route.by_expert(rows), route.tokens_per_expert, route.by_expert(probs))
    answers = route.by_rank(answers)
    if shares > 1:
        exchange = AllToAll(groups.etp, copies, route.gathered).start(answers)
        yield
        (partial,) = exchange.finish()
        partial = partial.view(shares, -1, partial.shape[-1])
        wide = torch.promote_types(partial.dtype, torch.float32)
        answers = partial.sum(dim=0, dtype=wide).to(partial.dtype)

    exchange = AllToAll(groups.ep, route.sent, route.received).start(answers)
    yield
    (answers,) = exchange.finish()
    return _Combine.apply(answers, route)
