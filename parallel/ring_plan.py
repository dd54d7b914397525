"""Which keys each rank sends to which other, and which of its queries see what arrives.

Only a document that lies in several pieces needs a message: its keys in one piece go to the ranks
that hold later pieces of it, and to no others. Every rank knows the whole cut, so both ends of a
message come to the same conclusion. All is plain integers, made once for a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.cut import Cut, Span
from parallel.partial_attention import Rectangle


@dataclass(frozen=True)
class RingStep:
    """One step of the ring: keys to one rank, and from one.

    Attributes:
        target, source: ranks to send to and to receive from.
        outgoing: parts of the local row whose keys the target needs.
        incoming: keys that the source sends.
        rectangles: local queries and their keys among the incoming ones.
    """

    target: int
    source: int
    outgoing: list[slice]
    incoming: int
    rectangles: list[Rectangle]

    @property
    def sent(self) -> int:
        """Keys that the target needs."""
        return sum(part.stop - part.start for part in self.outgoing)


@dataclass(frozen=True)
class RingPlan:
    """What one rank does in varlen ring attention.

    Attributes:
        bounds: borders of the segments of the local row, causal in themselves.
        own: queries that see earlier pieces of the same rank; keys in the local row.
        steps: one for each other rank, in one order on all ranks, with messages or without.
    """

    bounds: list[int]
    own: list[Rectangle]
    steps: list[RingStep]

    @classmethod
    def of(cls, cut: Cut, rank: int) -> RingPlan:
        return cls(
            cut.local_bounds(rank),
            _rectangles(cut, rank, rank),
            [_step(cut, rank, distance) for distance in range(1, cut.ranks)],
        )


def _step(cut: Cut, rank: int, distance: int) -> RingStep:
    target, source = (rank + distance) % cut.ranks, (rank - distance) % cut.ranks
    incoming = sum(
        span.end - span.begin
        for spans in cut.crossings
        for span in keys_needed(spans, source, rank)
    )
    outgoing = [span.local for spans in cut.crossings for span in keys_needed(spans, rank, target)]
    return RingStep(target, source, outgoing, incoming, _rectangles(cut, rank, source))


def keys_needed(spans: Sequence[Span], source: int, target: int) -> list[Span]:
    """The spans of a document on rank `source` that come before one on rank `target`."""
    last = max((i for i, span in enumerate(spans) if span.rank == target), default=0)
    return [span for span in spans[:last] if span.rank == source]


def _rectangles(cut: Cut, rank: int, source: int) -> list[Rectangle]:
    """What the queries of `rank` see of the keys of `source`: in its local row where they are the
    same, otherwise in the message, where needed spans lie one after another."""
    found: list[Rectangle] = []
    before = 0
    for spans in cut.crossings:
        places: dict[Span, slice] = {}
        for span in keys_needed(spans, source, rank):
            places[span] = slice(before, before + span.end - span.begin)
            before = places[span].stop
        if source == rank:
            places = {span: span.local for span in places}
        for query in spans:
            if query.rank == rank:
                keys = [place for span, place in places.items() if span.end <= query.begin]
                found += [Rectangle(query.local, key) for key in _joined(keys)]
    return found


def _joined(parts: Sequence[slice]) -> list[slice]:
    """The same places in as few slices as possible."""
    joined: list[slice] = []
    for part in parts:
        if joined and joined[-1].stop == part.start:
            part = slice(joined.pop().start, part.stop)
        joined.append(part)
    return joined
