"""Tokens of batched or packed rows laid out in chunks of one length, each inside one document.

Shapes: B rows, T tokens in a row, M chunks in a row, C tokens in a chunk, H heads, D width,
N documents in a row.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Chunks:
    """Each document starts a chunk of its own; its last chunk is filled up with zeros.

    A document of length zero keeps one empty chunk, so every document has a first and a last one.
    """

    tokens: int
    size: int
    first_N: list[int]
    """The first chunk of each document of a row."""
    last_N: list[int]
    """The last chunk of each document of a row."""
    lengths_M: Tensor
    """`[M]` int64 tokens in each chunk."""
    slots_T: Tensor | None
    """`[T]` int64 place of each token among the M*C of its row; None where token t is at t."""
    sources: Tensor | None
    """`[M*C]` int64 the token at each place, or T where there is none; None with `slots_T`."""

    @classmethod
    def of_documents(cls, bounds: list[int], size: int, device: torch.device) -> "Chunks":
        """Chunks of `size` tokens for a row with the document borders `bounds`."""
        tokens = bounds[-1]
        lengths: list[int] = []
        first: list[int] = []
        last: list[int] = []
        shifts: list[int] = []
        for begin, end in pairwise(bounds):
            first.append(len(lengths))
            shifts.append(len(lengths) * size - begin)
            full, rest = divmod(end - begin, size)
            lengths += [size] * full + ([rest] if rest or not full else [])
            last.append(len(lengths) - 1)
        slots_T = sources = None
        if len(first) > 1:
            place = torch.arange(tokens)
            slots_T = place + torch.tensor(shifts).repeat_interleave(torch.tensor(bounds).diff())
            sources = torch.full((len(lengths) * size,), tokens).scatter_(0, slots_T, place)
            slots_T, sources = slots_T.to(device), sources.to(device)
        lengths_M = torch.tensor(lengths, device=device)
        return cls(tokens, size, first, last, lengths_M, slots_T, sources)

    @property
    def count(self) -> int:
        return self.lengths_M.shape[0]

    def split(self, x_BTHD: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, T, H, D]` of any strides to a contiguous `[B, M, H, C, D]` of `dtype`."""
        if self.sources is not None:
            B, _, H, D = x_BTHD.shape
            with_zero_at_T = torch.cat((x_BTHD, x_BTHD.new_zeros(B, 1, H, D)), dim=1)
            x_BTHD = with_zero_at_T.index_select(1, self.sources)
        elif (missing := self.count * self.size - self.tokens) > 0:
            x_BTHD = pad(x_BTHD, (0, 0, 0, 0, 0, missing))
        x_BMHCD = x_BTHD.unflatten(1, (self.count, self.size)).transpose(2, 3)
        return x_BMHCD.to(dtype, memory_format=torch.contiguous_format).contiguous()

    def join(self, x_BMHCD: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `split`: `[B, M, H, C, D]` to a contiguous `[B, T, H, D]` of `dtype`."""
        x_BMCHD = x_BMHCD.transpose(2, 3).to(dtype, memory_format=torch.contiguous_format)
        x_BTHD = x_BMCHD.flatten(1, 2)
        if self.slots_T is not None:
            x_BTHD = x_BTHD.index_select(1, self.slots_T)
        return x_BTHD[:, : self.tokens].contiguous()
