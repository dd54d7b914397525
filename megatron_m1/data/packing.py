"""Which tokens go into which row of an epoch: whole documents packed, or one stream cut in rows.

Both plans are built from document lengths alone and cover an epoch in the same number of rows
whatever its shuffle, so that sample j of a source is row `j % len(plan)` of epoch
`j // len(plan)`, without planning the epochs before.

L  seq_length, input positions in a row
P  pieces: documents, the long ones cut
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel.packing import PackedRow

Int64s = NDArray[np.int64]


class Source(Protocol):
    """Documents to learn from: `IndexedTokens`, or anything else with these four."""

    name: str

    @property
    def lengths(self) -> Int64s:
        """[documents] tokens in each."""

    @property
    def fingerprint(self) -> str:
        """Changes when the documents do."""

    def read(self, document: int, start: int, stop: int) -> Int64s:
        """Tokens [start, stop) of a document."""


class Plan(Protocol):
    """An epoch of a source as rows of `seq_length` input positions."""

    efficiency: float
    """Share of all positions that carry a label."""

    def __len__(self) -> int:
        """Rows in an epoch."""

    def row(self, index: int, epoch: int = 0) -> PackedRow:
        """Row `index` of an epoch."""


class PackedPlan:
    """Best-fit packing of whole documents; attention and positions stay inside a document.

    A document of n tokens makes n - 1 input positions, each with its label. One that is longer than
    a row is cut in pieces that overlap by a token, so every token but a document's first is
    predicted exactly once an epoch. Documents of fewer than two tokens make no position.

    The packing is of lengths and is done once. An epoch shuffles which of the pieces of one length
    goes to which place made for that length, and the order of the rows.
    """

    def __init__(self, source: Source, seq_length: int, seed: int) -> None:
        _check_seq_length(seq_length)
        self._source, self._seq_length, self._seed = source, seq_length, seed
        document, start, size = _pieces(source.lengths, seq_length)
        descending = np.argsort(-size, kind="stable")  # best-fit wastes least with large ones first
        self._document, self._start, self._size = (
            array[descending] for array in (document, start, size)
        )
        row_of_place = best_fit(self._size, seq_length)
        self._places_by_row = np.argsort(row_of_place, kind="stable")
        self._row_bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of_place))])
        self.efficiency = _share(int(size.sum()), len(self) * seq_length)
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        return len(self._row_bounds) - 1

    def row(self, index: int, epoch: int = 0) -> PackedRow:
        row_order, piece_in_place = self._shuffled(epoch)
        row = row_order[index]
        places = self._places_by_row[self._row_bounds[row] : self._row_bounds[row + 1]]
        pieces = [self._read(piece) for piece in piece_in_place[places]]
        return PackedRow.from_documents(
            [tokens[:-1] for tokens in pieces],
            labels=[tokens[1:] for tokens in pieces],
            pad_to=self._seq_length,
        )

    def _shuffle(self, epoch: int) -> tuple[Int64s, Int64s]:
        """Row order [rows] and the piece in each place [P] of an epoch."""
        random = _random(self._seed, epoch)
        row_order = random.permutation(len(self))
        pieces = random.permutation(len(self._size))
        # Places are sorted by size, so a stable sort by size shuffles among equal sizes only.
        return row_order, pieces[np.argsort(-self._size[pieces], kind="stable")]

    def _read(self, piece: int) -> Tensor:
        start = int(self._start[piece])
        stop = start + int(self._size[piece]) + 1  # the last token is only a label
        return torch.from_numpy(self._source.read(int(self._document[piece]), start, stop))


class ConcatenatedPlan:
    """Shuffled documents as one stream, cut in rows; attention crosses documents.

    A row overlaps the next by a token, so every token of the stream but its first is predicted
    exactly once an epoch. Only the last row of an epoch may hold padding.
    """

    def __init__(self, source: Source, seq_length: int, seed: int) -> None:
        _check_seq_length(seq_length)
        self._source, self._seq_length, self._seed = source, seq_length, seed
        self._labels = max(int(source.lengths.sum()) - 1, 0)
        self.efficiency = _share(self._labels, len(self) * seq_length)
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        return -(-self._labels // self._seq_length)

    def row(self, index: int, epoch: int = 0) -> PackedRow:
        start = index * self._seq_length
        stop = min(start + self._seq_length, self._labels) + 1  # the last token is only a label
        tokens = self._read(start, stop, *self._shuffled(epoch))
        return PackedRow.from_documents([tokens[:-1]], [tokens[1:]], pad_to=self._seq_length)

    def _shuffle(self, epoch: int) -> tuple[Int64s, Int64s]:
        """The order of documents [documents] and where each ends in the stream, same shape."""
        order = _random(self._seed, epoch).permutation(len(self._source.lengths))
        return order, np.cumsum(self._source.lengths[order])

    def _read(self, start: int, stop: int, order: Int64s, ends: Int64s) -> Tensor:
        """Tokens [start, stop) of the stream."""
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        parts = []
        for document, end in zip(order[first : last + 1], ends[first : last + 1], strict=True):
            begin = end - self._source.lengths[document]
            inside = max(start, begin) - begin, min(stop, end) - begin
            parts.append(torch.from_numpy(self._source.read(int(document), *map(int, inside))))
        return torch.cat(parts)


def best_fit(sizes: Int64s, capacity: int) -> Int64s:
    """The row [P] each size [P] goes to: the fullest one with room for it, else a new one."""
    rows_with_space: defaultdict[int, list[int]] = defaultdict(list)
    spaces: list[int] = []  # the keys of rows_with_space that hold a row, ascending
    row_of_place = np.empty(len(sizes), dtype=np.int64)
    rows = 0
    for place, size in enumerate(sizes.tolist()):
        fit = bisect_left(spaces, size)
        if fit == len(spaces):
            row, space, rows = rows, capacity, rows + 1
        else:
            space = spaces[fit]
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                del spaces[fit]
        row_of_place[place] = row
        if left := space - size:
            if not rows_with_space[left]:
                insort(spaces, left)
            rows_with_space[left].append(row)
    return row_of_place


def _pieces(lengths: Int64s, seq_length: int) -> tuple[Int64s, Int64s, Int64s]:
    """Document, first token and input positions of every piece, each [P]."""
    positions = np.maximum(lengths - 1, 0)
    counts = -(-positions // seq_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    first_piece = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(document)) - first_piece) * seq_length
    return document, start, np.minimum(positions[document] - start, seq_length)


def _random(seed: int, epoch: int) -> np.random.RandomState:
    # RandomState's stream is frozen: a run resumed under a newer NumPy sees the same order.
    return np.random.RandomState([seed % 2**32, epoch])


def _share(labels: int, positions: int) -> float:
    return labels / positions if positions else 0.0


def _check_seq_length(seq_length: int) -> None:
    if seq_length < 1:
        raise ValueError(f"seq_length is {seq_length}; a row needs at least 1 position")
