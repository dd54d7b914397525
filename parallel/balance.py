"""Pieces of a packed row such that each rank has equal tokens and equal causal softmax work.

Two measures on a line can be shared out equally between R ranks by at most 2 (R - 1) cuts (the
necklace splitting theorem: Alon, "Splitting necklaces", Advances in Mathematics 63, 1987). For two
measures the proof is an algorithm. Close the tokens to a circle and slide along it a window that
holds the share s of them: the mean of its work over all places is s of the whole work, and one step
changes the work by no more than one token's, so at some place the window holds the share s of the
work as well. Windows of half the ranks, then of half of those, give every rank its pieces.

Of all places that are good enough the one is taken that cuts the fewest documents, since each cut
document costs a message.

T  tokens in the row
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.01
"""How far a rank's work may lie from the mean, as a share of it, where that saves cut documents."""

_Int64s = NDArray[np.int64]


def balanced_pieces(bounds: Sequence[int], ranks: int) -> list[tuple[int, int, int]]:
    """(rank, begin, end) of the pieces of the row with document borders `bounds`.

    The ranks divide the row; each gets the same number of tokens.
    """
    borders = np.asarray(bounds)
    starts = np.repeat(borders[:-1], np.diff(borders))
    tokens = np.arange(borders[-1])
    levels = max(ranks - 1, 1).bit_length()
    owned = _share_out(tokens, starts, range(ranks), TOLERANCE / levels)
    return [(rank, begin, end) for rank, part in owned for begin, end in _runs(part)]


def _share_out(
    tokens: _Int64s, starts_T: _Int64s, ranks: range, tolerance: float
) -> list[tuple[int, _Int64s]]:
    """(rank, its tokens) for the tokens of a group of ranks, all in row order."""
    if len(ranks) == 1:
        return [(ranks[0], tokens)]
    half = ranks[: len(ranks) // 2]
    size = len(tokens) // len(ranks) * len(half)
    begin = _best_window(tokens, starts_T, size, tolerance)
    inside = np.zeros(len(tokens), dtype=bool)
    inside[begin : begin + size] = True
    inside[: max(begin + size - len(tokens), 0)] = True
    return [
        *_share_out(tokens[inside], starts_T, half, tolerance),
        *_share_out(tokens[~inside], starts_T, ranks[len(half) :], tolerance),
    ]


def _best_window(tokens: _Int64s, starts_T: _Int64s, size: int, tolerance: float) -> int:
    """Where the window of `size` tokens begins."""
    starts = starts_T[tokens]
    work_before = np.concatenate([[0], np.cumsum(tokens - starts + 1)])
    begin = np.arange(len(tokens))
    end = (begin + size) % len(tokens)
    work = work_before[end] - work_before[begin] + (end <= begin) * work_before[-1]
    wanted = work_before[-1] * (size / len(tokens))
    error = np.abs(work - wanted)

    # A cut before token i parts a document unless one starts there, or the tokens are parted yet.
    parts = (starts < tokens) & (np.diff(tokens, prepend=-1) == 1)
    parts[0] = False
    cost = parts[begin].astype(np.int64) + parts[end]
    good = error <= max(tolerance * wanted, error.min())
    cost_then_error = cost + error / (work_before[-1] + 1)
    return int(np.where(good, cost_then_error, np.inf).argmin())


def _runs(tokens: _Int64s) -> list[tuple[int, int]]:
    """[begin, end) of each stretch of neighbours in rising tokens."""
    gaps = np.flatnonzero(np.diff(tokens) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(tokens, gaps)]
