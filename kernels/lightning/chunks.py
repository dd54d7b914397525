"""How rows of tokens are cut for lightning attention, and every decay between the parts.

A row is walked in segments of M equal chunks of C tokens. Documents that share a row do not move
the cuts: a border only turns the decays across it to zero.

Shapes: B rows, T tokens in a row, M chunks in a segment, C tokens in a chunk, H heads of one group,
Z = H * M chunks of all its heads, D key width, Dv value width.
"""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 32
"""Tokens in a chunk, and twice as many for heads wider than 64. Scores grow with it, what is done
to states falls with it; the break-even was measured on a CPU for widths of 32 to 128."""
TILE, DEVICE_TILE = 2**17, 2**22
"""Elements of one tensor of a segment. On a CPU the dozen tensors of a segment should stay in its
cache, yet each be long enough to share among threads; on a device few launches count for more."""
SEGMENT = 256
"""Tokens a segment is to have before more heads are taken at once: each leaves a state behind."""
MOST_CHUNKS = 32
"""Chunks of a segment: the product that carries the state among them grows with their square."""


class Segment(NamedTuple):
    """Neighbouring tokens of one row, in equal chunks, that are computed at once."""

    number: int
    """Its place among the segments of the call."""
    run: int
    """Which row, or which document of a row, it belongs to: whose state goes through it."""
    row: int
    tokens: slice
    chunks: int
    """M."""
    size: int
    """C."""
    documents: Tensor | None
    """`[1 + M * C]` which document the token before it and each of its own is of; None without a
    border among them."""


class Cut(NamedTuple):
    """All segments of a call in the order of their tokens, and the groups that heads form."""

    runs: int
    """The number of states that go through the segments."""
    segments: list[Segment]
    heads: list[slice]

    @classmethod
    def of(cls, q_BTHD: Tensor, width: int, bounds: list[int] | None, by_document: bool) -> "Cut":
        """Cut rows like `q_BTHD`, whose heads are up to `width` wide.

        `bounds` are the document borders of a packed row, of which each document is a run of its
        own with `by_document`.
        """
        B, T, H, _ = q_BTHD.shape
        chunk = CHUNK if width <= 2 * CHUNK else 2 * CHUNK
        tile = (TILE if q_BTHD.device.type == "cpu" else DEVICE_TILE) // width
        group = min(max(tile // SEGMENT, 1), H)
        most = min(max(tile // group // chunk, 1), MOST_CHUNKS)
        heads = [slice(h, min(h + group, H)) for h in range(0, H, group)]

        runs = [(row, 0, T) for row in range(B)]
        if by_document and bounds is not None:
            runs, bounds = [(0, *document) for document in pairwise(bounds)], None
        borders = _Borders(bounds, q_BTHD.device)
        segments: list[Segment] = []
        for run, (row, begin, end) in enumerate(runs):
            for tokens, chunks, size in _lay(begin, end, chunk, most):
                number, documents = len(segments), borders.within(tokens)
                segments.append(Segment(number, run, row, tokens, chunks, size, documents))
        return cls(len(runs), segments, heads)


def _lay(begin: int, end: int, chunk: int, most: int) -> Iterator[tuple[slice, int, int]]:
    """(tokens, number of chunks, their size) of each segment of the tokens `begin` to `end`.

    All have `most` chunks but the last ones: what is left in whole chunks, and a shorter one.
    """
    while begin < end:
        left = end - begin
        size = chunk if left >= 2 * chunk else left
        chunks = min(left // size, most)
        yield slice(begin, begin + chunks * size), chunks, size
        begin += chunks * size


class _Borders:
    """Where the documents of a packed row begin."""

    def __init__(self, bounds: list[int] | None, device: torch.device) -> None:
        # A row's first document has no border before it.
        self._starts = [] if bounds is None else [bound for bound in bounds[1:-1] if bound > 0]
        if bounds is not None and self._starts:
            of_token = torch.repeat_interleave(torch.tensor(bounds).diff())
            self._documents = torch.cat((of_token[:1], of_token)).to(device)

    def within(self, tokens: slice) -> Tensor | None:
        """`Segment.documents`."""
        if bisect_left(self._starts, tokens.start) == bisect_left(self._starts, tokens.stop):
            return None
        return self._documents[tokens.start : tokens.stop + 1]


class Decays(NamedTuple):
    """All decays of a segment: exp(-s n) over n tokens of one document, and zero between documents.

    The only place where `exp` is taken, of numbers <= 0: no slope is too steep.
    """

    scores_ZCC: Tensor
    """exp(-s (i - j)) from key j to query i >= j."""
    queries_ZC1: Tensor
    """exp(-s (i + 1)) from the state that enters the chunk to query i."""
    keys_ZC1: Tensor
    """exp(-s (C - 1 - j)) from key j to the state that leaves the chunk."""
    carry_HMM: Tensor
    """exp(-s C (m - 1 - n)) from the state that leaves chunk n to the one that enters m > n."""
    cross_HM1: Tensor
    """exp(-s C) from the state that enters chunk m to the one that leaves it."""

    @classmethod
    def of(cls, decay_H: Tensor, chunks: int, size: int, dtype: torch.dtype) -> "Decays":
        """For `chunks` chunks of `size` tokens of one document."""

        def powers(count: int, tokens: int) -> Tensor:
            """`[H, count]` exp(-s n) for n = 0, tokens, 2 tokens, ..."""
            steps = torch.arange(0, count * tokens, tokens, dtype=dtype, device=decay_H.device)
            return torch.outer(-decay_H.to(dtype), steps).exp_()

        def of_chunks(factor_HCX: Tensor) -> Tensor:
            return factor_HCX.repeat_interleave(chunks, dim=0)

        token_HC = powers(size + 1, 1)
        edges_HEE = _toeplitz(powers(chunks + 1, size))
        return cls(
            scores_ZCC=of_chunks(_toeplitz(token_HC[:, :-1])),
            queries_ZC1=of_chunks(token_HC[:, 1:, None]),
            keys_ZC1=of_chunks(token_HC[:, :-1, None].flip(1)),
            carry_HMM=edges_HEE[:, :-1, 1:],
            cross_HM1=edges_HEE.diagonal(-1, 1, 2)[..., None],
        )

    def within(self, documents: Tensor | None) -> "Decays":
        """The same without what crosses a border, for `Segment.documents`."""
        if documents is None:
            return self
        size = self.scores_ZCC.shape[-1]
        # Of the token before a chunk and each of its own; of the token before each edge of a chunk.
        token_MX, edge_E = documents.unfold(0, size + 1, size), documents[::size]
        same_MXX = token_MX[:, :, None] == token_MX[:, None, :]
        same_EE = edge_E[:, None] == edge_E

        def of_chunks(factor_ZCX: Tensor, same_MCX: Tensor) -> Tensor:
            return (factor_ZCX.unflatten(0, (-1, len(same_MCX))) * same_MCX).flatten(0, 1)

        return Decays(
            scores_ZCC=of_chunks(self.scores_ZCC, same_MXX[:, 1:, 1:]),
            queries_ZC1=of_chunks(self.queries_ZC1, same_MXX[:, 1:, :1]),
            keys_ZC1=of_chunks(self.keys_ZC1, same_MXX[:, 1:, -1:]),
            carry_HMM=self.carry_HMM * same_EE[:-1, 1:],
            cross_HM1=self.cross_HM1 * same_EE.diagonal(-1)[:, None],
        )


def _toeplitz(power_HX: Tensor) -> Tensor:
    """`[H, X, X]` with power i - j at (i, j), and zero above the diagonal."""
    size = power_HX.shape[1]
    return pad(power_HX, (size - 1, 0)).unfold(1, size, 1).flip(2)
