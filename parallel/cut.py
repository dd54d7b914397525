"""How a packed row is cut over the ranks of a context-parallel group, and put together again.

A cut knows nothing but the row's document borders, so every rank computes the whole of it from the
row it read, and no rank has to ask another. Each rank holds equally many tokens, in one or more
pieces; the same cut serves every layer of the model.

T  tokens in the row; N  documents in it
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from parallel.balance import balanced_pieces
from parallel.layout import CUTS


@dataclass(frozen=True)
class Piece:
    """Tokens [begin, end) of the row, held by one rank from its local token `local` on."""

    rank: int
    begin: int
    end: int
    local: int

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Span:
    """The part of one document that lies in one piece: row tokens [begin, end)."""

    piece: Piece
    begin: int
    end: int

    @property
    def rank(self) -> int:
        return self.piece.rank

    @property
    def local(self) -> slice:
        """Where it is in the local row of its rank."""
        shift = self.piece.local - self.piece.begin
        return slice(self.begin + shift, self.end + shift)


@dataclass(frozen=True)
class Cut:
    """A row of documents in pieces.

    Attributes:
        bounds: the N+1 borders of the documents, rising from 0 to T; none is empty.
        ranks: ranks in the context-parallel group.
        pieces: in the order of the row.
    """

    bounds: tuple[int, ...]
    ranks: int
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, bounds: Sequence[int], ranks: int, kind: str = "balanced") -> Cut:
        """Cut the row with the document borders `bounds`.

        "contiguous": rank r holds the r-th of `ranks` equal pieces. "zigzag": rank r holds the
        r-th and the r-th last of 2*ranks equal pieces. "balanced": pieces of any length such that
        the ranks have the same work in causal softmax attention (see `parallel.balance`).

        Raises ValueError for an unknown kind, or a row that `padding_multiple` does not divide.
        """
        if kind not in CUTS:
            raise ValueError(f"the cut of a row must be one of {', '.join(CUTS)}, got {kind!r}")
        bounds = tuple(dict.fromkeys(bounds))  # without documents of length zero
        multiple = padding_multiple(ranks, kind)
        if bounds[-1] % multiple or not bounds[-1]:
            raise ValueError(
                f"a row of {bounds[-1]} tokens cannot be cut {kind} over {ranks} context-parallel "
                f"ranks: pad it to a multiple of {multiple}"
            )
        if kind == "balanced":
            owned = balanced_pieces(bounds, ranks)
        else:
            owned = _equal_pieces(bounds[-1], ranks, 2 if kind == "zigzag" else 1)
        return cls(bounds, ranks, _placed(owned, ranks))

    @property
    def local_tokens(self) -> int:
        """Tokens on each rank."""
        return self.bounds[-1] // self.ranks

    def of_rank(self, rank: int) -> list[Piece]:
        """The pieces of a rank, in the order of its local row."""
        return [piece for piece in self.pieces if piece.rank == rank]

    def take(self, row: Tensor, rank: int, dim: int = 0) -> Tensor:
        """A rank's tokens of a tensor with the whole row's T tokens along `dim`."""
        parts = [row.narrow(dim, piece.begin, len(piece)) for piece in self.of_rank(rank)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, local_rows: Sequence[Tensor], dim: int = 0) -> Tensor:
        """The whole row of the ranks' tokens, given in rank order: the inverse of `take`."""
        return torch.cat(
            [local_rows[p.rank].narrow(dim, p.local, len(p)) for p in self.pieces], dim
        )

    def local_bounds(self, rank: int) -> list[int]:
        """Borders of the segments of a rank's local row: document borders and piece edges."""
        borders = [0]
        for piece in self.of_rank(rank):
            first, last = (
                bisect_right(self.bounds, piece.begin),
                bisect_left(self.bounds, piece.end),
            )
            shift = piece.local - piece.begin
            borders += [border + shift for border in (*self.bounds[first:last], piece.end)]
        return borders

    @cached_property
    def crossings(self) -> tuple[tuple[Span, ...], ...]:
        """The documents that lie in more than one piece, each as its spans in row order."""
        edges = [piece.end for piece in self.pieces[:-1]]
        crossed = dict.fromkeys(
            bisect_right(self.bounds, edge) - 1 for edge in edges if not self._is_border(edge)
        )
        return tuple(self._spans(self.bounds[n], self.bounds[n + 1]) for n in crossed)

    def _is_border(self, token: int) -> bool:
        return self.bounds[bisect_left(self.bounds, token)] == token

    def _spans(self, begin: int, end: int) -> tuple[Span, ...]:
        first, last = bisect_right(self._begins, begin) - 1, bisect_left(self._begins, end)
        return tuple(
            Span(piece, max(begin, piece.begin), min(end, piece.end))
            for piece in self.pieces[first:last]
        )

    @cached_property
    def _begins(self) -> list[int]:
        return [piece.begin for piece in self.pieces]

    @cached_property
    def work(self) -> list[int]:
        """Pairs of a query and a key that it sees, for the queries of each rank."""
        pairs = [0] * self.ranks
        for begin, end in pairwise(self.bounds):
            for span in self._spans(begin, end):
                pairs[span.rank] += _triangle(span.end - begin) - _triangle(span.begin - begin)
        return pairs

    @property
    def imbalance(self) -> float:
        """Softmax work of the busiest rank over the mean: 1 where all have the same."""
        return max(self.work) * self.ranks / sum(self.work)


def padding_multiple(ranks: int, kind: str) -> int:
    """What the tokens of a row must be a multiple of."""
    return 2 * ranks if kind == "zigzag" else ranks


def _equal_pieces(tokens: int, ranks: int, each: int) -> list[tuple[int, int, int]]:
    """(rank, begin, end) of `each * ranks` equal pieces, dealt forwards, then backwards."""
    size = tokens // (each * ranks)
    dealt = [*range(ranks), *reversed(range(ranks))][: each * ranks]
    return [(rank, i * size, (i + 1) * size) for i, rank in enumerate(dealt)]


def _placed(owned: Sequence[tuple[int, int, int]], ranks: int) -> tuple[Piece, ...]:
    """Pieces of (rank, begin, end) in row order, neighbours of one rank made one."""
    merged: list[tuple[int, int, int]] = []
    for rank, begin, end in sorted(owned, key=lambda piece: piece[1]):
        if merged and merged[-1][0] == rank:
            begin = merged.pop()[1]
        merged.append((rank, begin, end))
    filled = [0] * ranks
    pieces = []
    for rank, begin, end in merged:
        pieces.append(Piece(rank, begin, end, filled[rank]))
        filled[rank] += end - begin
    return tuple(pieces)


def _triangle(side: int) -> int:
    return side * (side + 1) // 2
