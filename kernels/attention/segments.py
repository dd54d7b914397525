"""Which queries of a packed row see which keys: segment n of the queries segment n of the keys."""

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple


class Run(NamedTuple):
    """Neighbouring segments of equal lengths, which a kernel can take as one batch."""

    queries: slice
    keys: slice
    queries_each: int
    keys_each: int


@dataclass(frozen=True)
class Segments:
    """N segments by their N+1 borders among the queries and among the keys, on the host.

    A causal segment has as many queries as keys, and a query sees the keys up to its own place;
    otherwise every query of a segment sees all its keys.
    """

    bounds_q: list[int]
    bounds_k: list[int]
    causal: bool

    def __post_init__(self) -> None:
        if len(self.bounds_q) != len(self.bounds_k) or len(self.bounds_q) < 2:
            raise ValueError(
                "bounds_q and bounds_k must have one length of at least 2, got "
                f"{len(self.bounds_q)} and {len(self.bounds_k)}"
            )
        for name, bounds in (("bounds_q", self.bounds_q), ("bounds_k", self.bounds_k)):
            falls = any(end < begin for begin, end in pairwise(bounds))
            if bounds[0] != 0 or falls:
                raise ValueError(f"{name} must start at 0 and never fall, got {bounds}")
        if self.causal and self.bounds_q != self.bounds_k:
            raise ValueError(
                "causal segments must have as many queries as keys, got bounds_q "
                f"{self.bounds_q} and bounds_k {self.bounds_k}"
            )

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """The number of queries and of keys of each segment."""
        queries = (end - begin for begin, end in pairwise(self.bounds_q))
        keys = (end - begin for begin, end in pairwise(self.bounds_k))
        return list(zip(queries, keys, strict=True))

    def runs(self) -> list[Run]:
        """The segments that have queries and keys, in order, as runs."""
        runs = []
        q = k = 0
        for (queries, keys), group in groupby(self.lengths):
            count = len(list(group))
            run = Run(slice(q, q + count * queries), slice(k, k + count * keys), queries, keys)
            if queries and keys:
                runs.append(run)
            q, k = run.queries.stop, run.keys.stop
        return runs
