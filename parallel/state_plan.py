"""Which lightning states cross the edges of pieces, and how far they decay on their way.

A document that lies in several pieces leaves a state behind each of its spans but the last, made
from the tokens of that span alone. What enters a span is the sum of all that was left before it,
each decayed by the tokens in between. The backward is the mirror image: every span but the first
leaves a gradient in front of itself, for the spans before it. All is plain integers, made once for
a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

from parallel.cut import Cut, Span


@dataclass(frozen=True)
class Hop:
    """A span on the way of a state.

    Attributes:
        rank: the rank that holds it.
        tokens: its length, over which the state decays.
        slot: where its own state lies among those that its rank gives; None for the last hop.
        segment: its place among the segments of the local row, None on other ranks.
    """

    rank: int
    tokens: int
    slot: int | None
    segment: int | None


@dataclass(frozen=True)
class Carry:
    """The ways of all states in one direction, as one rank sees them.

    Attributes:
        ways: of each cut document, its spans in the order in which the state passes.
        slots: the most states that any rank gives.
    """

    ways: list[list[Hop]]
    slots: int

    @classmethod
    def of(cls, crossings: Iterable[Iterable[Span]], cut: Cut, rank: int) -> Carry:
        segment_at = {begin: index for index, begin in enumerate(cut.local_bounds(rank))}
        given = [count() for _ in range(cut.ranks)]
        ways = []
        for spans in crossings:
            *passed, last = spans
            hops = [(span, next(given[span.rank])) for span in passed]
            ways.append(
                [
                    Hop(
                        span.rank,
                        span.end - span.begin,
                        slot,
                        segment_at[span.local.start] if span.rank == rank else None,
                    )
                    for span, slot in [*hops, (last, None)]
                ]
            )
        return cls(ways, max(map(next, given)))

    @property
    def given(self) -> list[int]:
        """The local segments whose states this rank gives, in the order of their slots."""
        hops = (hop for way in self.ways for hop in way)
        return [hop.segment for hop in hops if hop.segment is not None and hop.slot is not None]


@dataclass(frozen=True)
class StatePlan:
    """What one rank does so that lightning states cross the edges of its pieces.

    Attributes:
        bounds: borders of the segments of the local row.
        forward: ways of states; backward: ways of their gradients.
    """

    bounds: list[int]
    forward: Carry
    backward: Carry

    @classmethod
    def of(cls, cut: Cut, rank: int) -> StatePlan:
        mirrored = [spans[::-1] for spans in cut.crossings]
        return cls(
            cut.local_bounds(rank),
            Carry.of(cut.crossings, cut, rank),
            Carry.of(mirrored, cut, rank),
        )

    def segment(self, index: int) -> slice:
        """Where a segment lies in the local row."""
        return slice(self.bounds[index], self.bounds[index + 1])
