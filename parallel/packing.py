"""A packed row: several documents side by side in one row of tokens, each a segment of its own.

T  positions in the row (padding included), or those of one context-parallel rank
N  segments in the row: documents, then at most one segment of padding per joined or padded row; in
   a rank's part of a row, parts of documents
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from parallel.cut import Cut
from parallel.shard import Shard

_PER_TOKEN = ("tokens", "labels", "loss_mask", "positions", "padding")


@dataclass(frozen=True, eq=False)
class PackedRow:
    """What the data reader hands to the model: one micro-batch is one such row.

    tokens      [T] int64, inputs
    labels      [T] int64, the token to predict at each position (0 where loss_mask is 0)
    loss_mask   [T] float32, 1 where the position counts in the loss
    positions   [T] int64, restarting at 0 in each segment
    padding     [T] bool, true where there is no token of a document; left out, it is false
    cu_seqlens  [N+1] int32, segment n covers positions cu_seqlens[n] to cu_seqlens[n+1]
    max_seqlen  length of the longest segment
    cu_seqlens_host  the same numbers as `cu_seqlens`, always in host memory, so that code that
                     plans work from segment lengths never waits for the device
    shard       where this part of a row lies in the whole one; None for a whole row. Positions and
                labels are those of the whole row.
    extra       [T, ...] tensors by name that a loss needs of each token; cut and moved with the
                row, and 0 in padding
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    cu_seqlens_host: Tensor = None  # type: ignore[assignment]  # filled in from cu_seqlens
    shard: Shard | None = None
    padding: Tensor = None  # type: ignore[assignment]  # filled in
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cu_seqlens_host is None:
            object.__setattr__(self, "cu_seqlens_host", self.cu_seqlens.cpu())
        if self.padding is None:
            none = torch.zeros_like(self.tokens, dtype=torch.bool)
            object.__setattr__(self, "padding", none)

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Tensor],
        labels: Sequence[Tensor] | None = None,
        pad_to: int | None = None,
    ) -> PackedRow:
        """Lay documents (each [n] int64 token ids) side by side; empty ones take no segment.

        With `labels` (one tensor per document, of its length) every document position is
        predicted. Without, the label is the document's next token, and a document's last position,
        which has none, is masked. Padding up to `pad_to` positions is a last, masked segment.

        Raises ValueError for labels that do not match, or documents that do not fit `pad_to`.
        """
        _check_labels(documents, labels)
        lengths = [len(d) for d in documents if len(d)]
        used = sum(lengths)
        padding = _padding(used, pad_to)
        loss_mask = torch.ones(used + padding)
        loss_mask[used:] = 0
        if labels is None:
            labels = [torch.cat([d[1:], d.new_zeros(min(len(d), 1))]) for d in documents]
            loss_mask[torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1] = 0

        lengths += [padding] if padding else []
        zeros = torch.zeros(padding, dtype=torch.int64)
        return cls(
            tokens=torch.cat([*documents, zeros]),
            labels=torch.cat([*labels, zeros]),
            loss_mask=loss_mask,
            positions=torch.cat([torch.arange(length) for length in lengths]),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
            max_seqlen=max(lengths),
            padding=torch.arange(used + padding) >= used,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRow:
        """The same row with every tensor but `cu_seqlens_host` on `device`."""
        names = (*_PER_TOKEN, "cu_seqlens")
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
        extra = {k: v.to(device, non_blocking=non_blocking) for k, v in self.extra.items()}
        return replace(self, **moved, extra=extra)

    def padded(self, multiple: int) -> PackedRow:
        """The row with a masked segment at its end that makes T a multiple of `multiple`."""
        missing = -len(self) % multiple
        return (
            concatenate([self, PackedRow.from_documents([], pad_to=missing)]) if missing else self
        )

    def cut(self, ranks: int, rank: int, kind: str) -> PackedRow:
        """A context-parallel rank's part of a whole row; `kind` and errors as in `Cut.of`."""
        cut = Cut.of(self.cu_seqlens_host.tolist(), ranks, kind)
        bounds = cut.local_bounds(rank)
        return PackedRow(
            **{name: cut.take(getattr(self, name), rank) for name in _PER_TOKEN},
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=self.cu_seqlens.device),
            max_seqlen=max(end - begin for begin, end in pairwise(bounds)),
            shard=Shard(cut, rank),
            extra={name: cut.take(value, rank) for name, value in self.extra.items()},
        )

    @property
    def whole_length(self) -> int:
        """Positions in the row that this is, or is a part of."""
        return self.shard.cut.bounds[-1] if self.shard else len(self)

    @property
    def document_bounds(self) -> Tensor:
        """`cu_seqlens_host` of the row that this is, or is a part of."""
        return torch.tensor(self.shard.cut.bounds) if self.shard else self.cu_seqlens_host

    def __len__(self) -> int:
        """T, positions in the row."""
        return self.tokens.shape[0]


def concatenate(rows: Sequence[PackedRow]) -> PackedRow:
    """Join rows into one long row; segments keep their order and none spans two rows.

    Raises ValueError when there is no row to join.
    """
    if not rows:
        raise ValueError("concatenate() was given no rows: a micro-batch needs at least one")
    if len(rows) == 1:
        return rows[0]
    starts = torch.tensor([0, *(len(row) for row in rows[:-1])]).cumsum(0, dtype=torch.int32)
    ends = [row.cu_seqlens_host[1:] + start for row, start in zip(rows, starts, strict=True)]
    cu_seqlens = torch.cat([rows[0].cu_seqlens_host[:1], *ends])
    return PackedRow(
        **{name: torch.cat([getattr(row, name) for row in rows]) for name in _PER_TOKEN},
        cu_seqlens=cu_seqlens.to(rows[0].cu_seqlens.device),
        max_seqlen=max(row.max_seqlen for row in rows),
        cu_seqlens_host=cu_seqlens,
        extra=_joined_extra(rows),
    )


def _joined_extra(rows: Sequence[PackedRow]) -> dict[str, Tensor]:
    kinds = {name: value for row in rows for name, value in row.extra.items()}
    return {
        name: torch.cat(
            [row.extra.get(name, value.new_zeros(len(row), *value.shape[1:])) for row in rows]
        )
        for name, value in kinds.items()
    }


def _check_labels(documents: Sequence[Tensor], labels: Sequence[Tensor] | None) -> None:
    if labels is not None and [len(d) for d in documents] != [len(label) for label in labels]:
        raise ValueError(
            f"labels of lengths {[len(label) for label in labels]} were given for documents of "
            f"lengths {[len(d) for d in documents]}: each document needs one label per token"
        )


def _padding(used: int, pad_to: int | None) -> int:
    if not (pad_to or used):
        raise ValueError("a packed row needs at least one token, or a pad_to above 0")
    if pad_to is not None and used > pad_to:
        raise ValueError(f"documents of {used} tokens in all do not fit a row of pad_to={pad_to}")
    return 0 if pad_to is None else pad_to - used
