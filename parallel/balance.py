"""Pieces of a packed row such that each rank has equal tokens and equal causal softmax work.

Two measures on a line can be shared out equally between R ranks by at most 2 (R - 1) cuts (the
necklace splitting theorem: Alon, "Splitting necklaces", Advances in Mathematics 63, 1987). For two
measures the proof is an algorithm. Close the tokens to a circle and slide along it a window that
holds the share s of them: the mean of its work over all places is s of the whole work, and one step
changes the work by no more than one token's, so at some place the window holds the share s of the
work as well. Windows of half the ranks, then of half of those, give every rank its pieces.

Of all places that are good enough the one is taken that cuts the fewest documents, since each cut
document costs a message.

A token's work is its position in its document, from 1. While neither edge of the window passes a
border the work in it therefore changes by the same amount with each step, so that only places with
an edge at a border and those where the work crosses its share need to be looked at: the time grows
with the documents of the row and not with its tokens.

P  parts of documents that lie side by side in what a group of ranks shares; W  places of a window
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.01
"""How far a rank's work may lie from the mean, as a share of it, where that saves cut documents."""

_Int64s = NDArray[np.int64]


def balanced_pieces(bounds: Sequence[int], ranks: int) -> list[tuple[int, int, int]]:
    """(rank, begin, end) of the pieces of the row with document borders `bounds`, none of which is
    empty.

    The ranks divide the row; each gets the same number of tokens.
    """
    borders = np.asarray(bounds, dtype=np.int64)
    whole = _Parts.of([(0, int(borders[-1]))], borders)
    levels = max(ranks - 1, 1).bit_length()
    owned = _share_out(whole, borders, range(ranks), TOLERANCE / levels)
    return [(rank, begin, end) for rank, stretches in owned for begin, end in stretches]


@dataclass(frozen=True)
class _Parts:
    """Tokens of a group of ranks, closed to a circle: places 0 to `size`, first token to last.

    Attributes:
        stretches: tokens [begin, end) of the row, in its order, apart from one another.
        place_P: where each part of a document begins.
        first_P: the work of its first token; that of the next ones rises by 1.
        before_P: the work before it.
        work: of all tokens.
    """

    stretches: list[tuple[int, int]]
    size: int
    place_P: _Int64s
    first_P: _Int64s
    before_P: _Int64s
    work: int

    @classmethod
    def of(cls, stretches: list[tuple[int, int]], borders: _Int64s) -> _Parts:
        places, firsts, size = [], [], 0
        for begin, end in stretches:
            inside = borders[(borders > begin) & (borders < end)]
            starts = np.concatenate([[begin], inside])
            documents = borders[np.searchsorted(borders, starts, side="right") - 1]
            places.append(starts - begin + size)
            firsts.append(starts - documents + 1)
            size += end - begin
        place_P, first_P = np.concatenate(places), np.concatenate(firsts)
        length_P = np.diff(place_P, append=size)
        ends_P = np.cumsum(length_P * first_P + length_P * (length_P - 1) // 2)
        before_P = np.concatenate([[0], ends_P[:-1]])
        return cls(stretches, size, place_P, first_P, before_P, int(ends_P[-1]))

    def work_before(self, place_W: _Int64s) -> _Int64s:
        part_W = np.searchsorted(self.place_P, place_W, side="right") - 1
        tokens_W = place_W - self.place_P[part_W]
        below_W = tokens_W * (tokens_W - 1) // 2
        return self.before_P[part_W] + tokens_W * self.first_P[part_W] + below_W

    def between(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The stretches of the tokens at the places [begin, end)."""
        found = []
        place = 0
        for first, last in self.stretches:
            low, high = max(begin - place, 0), min(end - place, last - first)
            if low < high:
                found.append((first + low, first + high))
            place += last - first
        return found


def _share_out(
    parts: _Parts, borders: _Int64s, ranks: range, tolerance: float
) -> list[tuple[int, list[tuple[int, int]]]]:
    """(rank, its stretches of tokens) for the tokens of a group of ranks."""
    if len(ranks) == 1:
        return [(ranks[0], parts.stretches)]
    half = ranks[: len(ranks) // 2]
    size = parts.size // len(ranks) * len(half)
    begin = _best_window(parts, size, tolerance)
    end = begin + size
    before, after = parts.between(end - parts.size, begin), parts.between(end, parts.size)
    wrapped = parts.between(0, end - parts.size)
    inside = _joined([*wrapped, *parts.between(begin, end)])
    outside = _joined([*before, *after])
    return [
        *_share_out(_Parts.of(inside, borders), borders, half, tolerance),
        *_share_out(_Parts.of(outside, borders), borders, ranks[len(half) :], tolerance),
    ]


def _joined(stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same tokens, neighbours made one."""
    joined: list[tuple[int, int]] = []
    for begin, end in stretches:
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return joined


def _best_window(parts: _Parts, size: int, tolerance: float) -> int:
    """Where the window of `size` tokens begins."""
    wanted = parts.work * (size / parts.size)
    # Places with an edge at a border, where the work in the window changes its slope.
    begin_W = np.union1d(parts.place_P, (parts.place_P - size) % parts.size)
    work_W = _work_inside(parts, begin_W, size)
    steps_W = np.diff(begin_W, append=parts.size)
    slope_W = (np.roll(work_W, -1) - work_W) // steps_W
    # The places before and after the one at which the line between two of them meets the share.
    crosses = slope_W != 0
    ahead_W = np.floor((wanted - work_W[crosses]) / slope_W[crosses])
    meets = (ahead_W >= 0) & (ahead_W < steps_W[crosses])
    before_W = begin_W[crosses][meets] + ahead_W[meets].astype(np.int64)
    begin_W = np.unique(np.concatenate([begin_W, before_W, (before_W + 1) % parts.size]))

    error_W = np.abs(_work_inside(parts, begin_W, size) - wanted)
    is_cut = [~np.isin(edge, parts.place_P) for edge in (begin_W, (begin_W + size) % parts.size)]
    cost_W = is_cut[0].astype(np.int64) + is_cut[1]
    good_W = error_W <= max(tolerance * wanted, error_W.min())
    cost_then_error_W = cost_W + error_W / (parts.work + 1)
    return int(begin_W[np.where(good_W, cost_then_error_W, np.inf).argmin()])


def _work_inside(parts: _Parts, begin_W: _Int64s, size: int) -> _Int64s:
    """Work in the windows that begin at these places."""
    end_W = (begin_W + size) % parts.size
    inside_W: _Int64s = parts.work_before(end_W) - parts.work_before(begin_W)
    return inside_W + (end_W <= begin_W) * parts.work
