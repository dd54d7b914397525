"""``12+7-30=`` -> ``-11``: sums, differences and products of whole numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from megatron_m1.rl.tasks.task import ExactAnswer, Problem, check_knob


@dataclass(frozen=True)
class Arithmetic(ExactAnswer):
    """Products come before sums, as usual.

    Attributes:
        digits: of each number at most; how many is drawn for each.
        terms: numbers in a problem.
        operators: drawn from these, of ``+-*``; one that stands twice is drawn twice as often.
    """

    digits: int = 2
    terms: int = 2
    operators: str = "+-"
    name: ClassVar[str] = "arithmetic"

    def __post_init__(self) -> None:
        check_knob(self.name, "digits", self.digits, 1, 18)
        check_knob(self.name, "terms", self.terms, 2, 16)
        if not self.operators or set(self.operators) - set("+-*"):
            raise ValueError(f"arithmetic: operators is {self.operators!r}; give some of +-*")

    @classmethod
    def at(cls, difficulty: int) -> Arithmetic:
        """Sums and differences of two numbers of up to ``difficulty`` + 1 digits."""
        return cls(digits=difficulty + 1)

    def problem(self, random: Random) -> Problem:
        numbers = [self._number(random) for _ in range(self.terms)]
        operators = [random.choice(self.operators) for _ in range(self.terms - 1)]
        pairs = zip(numbers, [*operators, "="], strict=True)
        text = "".join(f"{number}{operator}" for number, operator in pairs)
        answer = str(_value(numbers, operators))
        return Problem(text, answer, answer)

    def _number(self, random: Random) -> int:
        # Numbers of each length come equally often: among those below 1000, nine in ten have three.
        digits = random.randint(1, self.digits)
        return random.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _value(numbers: list[int], operators: list[str]) -> int:
    """The summands, each a product of numbers, added up."""
    summands = [[numbers[0]]]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            summands[-1].append(number)
        else:
            summands.append([number if operator == "+" else -number])
    return sum(map(math.prod, summands))
