"""The balanced cut against its plain twin, which looks at every token as the edge of a window."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from parallel.balance import TOLERANCE, balanced_pieces

Pieces = list[tuple[int, int, int]]


def plain(bounds: list[int], ranks: int) -> Pieces:
    starts = np.repeat(bounds[:-1], np.diff(bounds))
    levels = max(ranks - 1, 1).bit_length()
    return shared_out(np.arange(bounds[-1]), starts, list(range(ranks)), TOLERANCE / levels)


def shared_out(
    tokens: np.ndarray, starts: np.ndarray, ranks: list[int], tolerance: float
) -> Pieces:
    if len(ranks) == 1:
        runs = np.split(tokens, np.flatnonzero(np.diff(tokens) != 1) + 1)
        return [(ranks[0], int(run[0]), int(run[-1]) + 1) for run in runs]
    half = ranks[: len(ranks) // 2]
    size = len(tokens) // len(ranks) * len(half)
    work = tokens - starts[tokens] + 1
    wanted = work.sum() * (size / len(tokens))
    windows = [np.roll(np.arange(len(tokens)), -begin)[:size] for begin in range(len(tokens))]
    errors = np.array([abs(work[window].sum() - wanted) for window in windows])
    # Two edges, each of which parts a document unless one starts there or was parted there before.
    parts = (starts[tokens] < tokens) & (np.diff(tokens, prepend=-1) == 1)
    parts[0] = False
    costs = np.array([int(parts[w[0]]) + parts[(w[0] + size) % len(tokens)] for w in windows])
    good = errors <= max(tolerance * wanted, errors.min())
    ranked = np.where(good, costs + errors / (work.sum() + 1), np.inf)
    inside = np.zeros(len(tokens), dtype=bool)
    inside[windows[int(ranked.argmin())]] = True
    return [
        *shared_out(tokens[inside], starts, half, tolerance),
        *shared_out(tokens[~inside], starts, ranks[len(half) :], tolerance),
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_pieces_are_those_of_the_plain_algorithm(ranks: int) -> None:
    random = np.random.RandomState(ranks)
    for documents in (1, 2, 3, 10, 60) * 3:
        tokens = ranks * random.randint(8, 40)
        borders = random.choice(tokens - 1, size=min(documents, tokens) - 1, replace=False) + 1
        bounds = [0, *sorted(borders.tolist()), tokens]
        assert balanced_pieces(bounds, ranks) == plain(bounds, ranks), bounds
    one_token_each = list(range(8 * ranks + 1))
    assert balanced_pieces(one_token_each, ranks) == plain(one_token_each, ranks)


def test_a_row_of_eighty_million_tokens() -> None:
    """Whose pairs of a query and a key do not fit 32 bits."""
    lengths = np.random.RandomState(0).lognormal(8, 2, size=2000).astype(int) + 1
    bounds = [0, *np.cumsum(lengths).tolist(), 80_000_000]
    pieces = balanced_pieces(bounds, 8)
    held, work = [0] * 8, [0] * 8
    for rank, begin, end in pieces:
        held[rank] += end - begin
        for low, high in pairwise([begin, *(b for b in bounds if begin < b < end), end]):
            start = max(b for b in bounds if b <= low)
            work[rank] += (high - start) * (high - start + 1) - (low - start) * (low - start + 1)
    assert held == [10_000_000] * 8
    assert max(work) * 8 < 1.02 * sum(work)
