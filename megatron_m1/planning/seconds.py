"""Seconds by piece of the work."""

from __future__ import annotations

from collections.abc import Mapping


class Seconds(dict[str, float]):
    """A piece that is not there takes no time."""

    def __missing__(self, piece: str) -> float:
        return 0.0

    def add(self, other: Mapping[str, float], times: float = 1.0) -> Seconds:
        """Put ``other`` to it, ``times`` times; returns itself."""
        for piece, taken in other.items():
            self[piece] += times * taken
        return self

    def total(self) -> float:
        return sum(self.values())
