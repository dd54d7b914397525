"""``sort 31 4 15=`` -> ``4 15 31``."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from megatron_m1.rl.tasks.task import ExactAnswer, Problem, check_knob


@dataclass(frozen=True)
class Sorting(ExactAnswer):
    """Ascending order, by value and not by spelling; numbers may be equal.

    Attributes:
        count: numbers to sort.
        digits: of each at most.
    """

    count: int = 3
    digits: int = 1
    name: ClassVar[str] = "sorting"

    def __post_init__(self) -> None:
        check_knob(self.name, "count", self.count, 2, 64)
        check_knob(self.name, "digits", self.digits, 1, 9)

    @classmethod
    def at(cls, difficulty: int) -> Sorting:
        """``difficulty`` + 2 digits."""
        return cls(count=difficulty + 2)

    def problem(self, random: Random) -> Problem:
        numbers = [random.randrange(10**self.digits) for _ in range(self.count)]
        answer = _joined(sorted(numbers))
        return Problem(f"sort {_joined(numbers)}=", answer, answer)


def _joined(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))
