"""``T&!(F|T),F^T=`` -> ``FT``: values of boolean expressions."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from megatron_m1.rl.tasks.task import ExactAnswer, Problem, check_knob

_OPERATORS = {"&": operator.and_, "|": operator.or_, "^": operator.xor}


@dataclass(frozen=True)
class BooleanLogic(ExactAnswer):
    """And ``&``, or ``|``, exclusive or ``^`` and not ``!``, with parentheses around every part.

    Attributes:
        operators: two-sided ones in each expression.
        expressions: of a problem, one letter of the answer each: with more, fewer are guessed.
    """

    operators: int = 2
    expressions: int = 1
    name: ClassVar[str] = "boolean_logic"

    def __post_init__(self) -> None:
        check_knob(self.name, "operators", self.operators, 0, 32)
        check_knob(self.name, "expressions", self.expressions, 1, 16)

    @classmethod
    def at(cls, difficulty: int) -> BooleanLogic:
        """One expression with ``difficulty`` + 1 operators."""
        return cls(operators=difficulty + 1)

    def problem(self, random: Random) -> Problem:
        drawn = [_expression(random, self.operators) for _ in range(self.expressions)]
        answer = "".join(_letter(value) for _, value in drawn)
        return Problem(",".join(text for text, _ in drawn) + "=", answer, answer)


def _expression(random: Random, operators: int) -> tuple[str, bool]:
    """An expression with so many operators, and its value."""
    if operators == 0:
        value = random.random() < 0.5
        text = _letter(value)
    else:
        left_operators = random.randrange(operators)
        left_text, left = _part(random, left_operators)
        right_text, right = _part(random, operators - 1 - left_operators)
        sign = random.choice(sorted(_OPERATORS))
        text, value = f"{left_text}{sign}{right_text}", _OPERATORS[sign](left, right)
    return text, value


def _part(random: Random, operators: int) -> tuple[str, bool]:
    """An expression as one side of an operator, now and then negated."""
    text, value = _expression(random, operators)
    if operators:
        text = f"({text})"
    return (f"!{text}", not value) if random.random() < 0.25 else (text, value)


def _letter(value: bool) -> str:
    return "T" if value else "F"
