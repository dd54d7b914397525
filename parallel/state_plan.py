"""Which lightning states cross the edges of pieces, and how far they decay on their way.

A document that lies in several pieces leaves a state behind each of its spans but the last, made
from the tokens of that span alone. What enters a span is the decayed prefix sum of what was left
before it. The backward is the mirror image: every span but the first leaves a gradient in front of
itself, for the spans before it. All is plain integers, made once for a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import count

from parallel.cut import Cut, Span


@dataclass(frozen=True)
class PrefixTerm:
    """A span of a cut document as a term of its prefix sum.

    Attributes:
        rank: the rank that holds it.
        tokens: its length, over which the sum before it decays.
        slot: where its own state lies among those that its rank sends; None for the last term.
        segment: its place among the segments of the local row, None on other ranks.
    """

    rank: int
    tokens: int
    slot: int | None
    segment: int | None


@dataclass(frozen=True)
class PrefixSums:
    """The prefix sums of all cut documents in one direction, as one rank sees them.

    Attributes:
        documents: the terms of each cut document, in the order of the sum.
        slots: the most states that any rank sends.
    """

    documents: list[list[PrefixTerm]]
    slots: int

    @classmethod
    def of(cls, crossings: Iterable[Iterable[Span]], cut: Cut, rank: int) -> PrefixSums:
        segment_at = {begin: index for index, begin in enumerate(cut.local_bounds(rank))}
        sent = [count() for _ in range(cut.ranks)]
        documents = []
        for spans in crossings:
            *earlier, last = spans
            slots = [(span, next(sent[span.rank])) for span in earlier]
            documents.append(
                [
                    PrefixTerm(
                        span.rank,
                        span.end - span.begin,
                        slot,
                        segment_at[span.local.start] if span.rank == rank else None,
                    )
                    for span, slot in [*slots, (last, None)]
                ]
            )
        return cls(documents, max(map(next, sent)))

    @cached_property
    def sent(self) -> list[int]:
        """The local segments whose states this rank sends, in the order of their slots."""
        terms = (term for document in self.documents for term in document)
        return [t.segment for t in terms if t.segment is not None and t.slot is not None]


@dataclass(frozen=True)
class Stretch:
    """Neighbouring segments of the local row, to be computed in one call: a segment of a cut
    document alone, others together. So states are held for those alone that have any.

    Attributes:
        first, last: segments [first, last).
        is_cut: whether it is a segment of a cut document.
    """

    first: int
    last: int
    is_cut: bool


@dataclass(frozen=True)
class StatePlan:
    """What one rank does so that lightning states cross the edges of its pieces.

    Attributes:
        bounds: borders of the segments of the local row.
        forward: prefix sums of states; backward: of their gradients.
    """

    bounds: list[int]
    forward: PrefixSums
    backward: PrefixSums

    @classmethod
    def of(cls, cut: Cut, rank: int) -> StatePlan:
        mirrored = [spans[::-1] for spans in cut.crossings]
        return cls(
            cut.local_bounds(rank),
            PrefixSums.of(cut.crossings, cut, rank),
            PrefixSums.of(mirrored, cut, rank),
        )

    @cached_property
    def stretches(self) -> list[Stretch]:
        """All of the local row."""
        terms = (term for document in self.forward.documents for term in document)
        found, done = [], 0
        for segment in sorted(term.segment for term in terms if term.segment is not None):
            if done < segment:
                found.append(Stretch(done, segment, False))
            found.append(Stretch(segment, segment + 1, True))
            done = segment + 1
        if done < len(self.bounds) - 1:
            found.append(Stretch(done, len(self.bounds) - 1, False))
        return found

    def tokens(self, first: int, last: int) -> slice:
        """Where the segments [first, last) lie in the local row."""
        return slice(self.bounds[first], self.bounds[last])
