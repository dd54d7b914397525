"""One context-parallel rank's part of a cut row, and what it does with the other parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from parallel.cut import Cut
from parallel.ring_plan import RingPlan
from parallel.state_plan import StatePlan


@dataclass(frozen=True)
class Shard:
    """Plans are made on the host when first asked for, once for all layers of a micro-batch."""

    cut: Cut
    rank: int

    @cached_property
    def ring(self) -> RingPlan:
        """For softmax attention."""
        return RingPlan.of(self.cut, self.rank)

    @cached_property
    def states(self) -> StatePlan:
        """For lightning attention."""
        return StatePlan.of(self.cut, self.rank)
