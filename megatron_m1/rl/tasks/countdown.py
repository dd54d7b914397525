"""``make 24:3 5 9=`` -> ``3*5+9``: an expression of given numbers with a given value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any, ClassVar, NamedTuple

from megatron_m1.rl.tasks.task import Problem, check_knob

_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")
# More tokens a number than an expression needs, so that parentheses cannot nest without end.
_TOKENS_A_NUMBER = 6
# Draws within which knobs that make problems at all have made one.
_TRIES = 20_000


@dataclass(frozen=True)
class Countdown:
    """Every number is used exactly once, with ``+-*/`` and parentheses; any such expression is
    right. Signs in front of a number, and numbers written together, are not.

    Attributes:
        numbers: how many are given.
        largest: of the numbers, which start at 1.
        operators: that the reference answers are made with; answers may use all four.
        largest_target: of the values asked for, which start at 1.
    """

    numbers: int = 3
    largest: int = 9
    operators: str = "+-*"
    largest_target: int = 99
    name: ClassVar[str] = "countdown"

    def __post_init__(self) -> None:
        check_knob(self.name, "numbers", self.numbers, 2, 8)
        check_knob(self.name, "largest", self.largest, 1, 999)
        check_knob(self.name, "largest_target", self.largest_target, self.largest, 10**6)
        if not self.operators or set(self.operators) - set("+-*/"):
            raise ValueError(f"countdown: operators is {self.operators!r}; give some of +-*/")
        random = Random(0)
        if not any(self._drawn(random) for _ in range(_TRIES)):
            raise ValueError(
                f"countdown: {self} makes no problem; give more operators, or larger largest and "
                "largest_target"
            )

    @classmethod
    def at(cls, difficulty: int) -> Countdown:
        """``difficulty`` + 2 numbers."""
        return cls(numbers=difficulty + 2)

    def problem(self, random: Random) -> Problem:
        while not (problem := self._drawn(random)):
            pass
        return problem

    def _drawn(self, random: Random) -> Problem | None:
        """A problem, where the numbers and operators that are drawn make one."""
        numbers = [random.randint(1, self.largest) for _ in range(self.numbers)]
        found = _combined(random, [_Part(n, str(n), 3) for n in numbers], self.operators)
        if not found or found.value > self.largest_target:
            return None
        given = " ".join(map(str, numbers))
        truth = {"target": found.value, "numbers": numbers}
        return Problem(f"make {found.value}:{given}=", found.text, truth)

    @staticmethod
    def is_right(answer: str, ground_truth: Any) -> bool:
        given = sorted(map(str, ground_truth["numbers"]))
        tokens = _tokens(answer, _TOKENS_A_NUMBER * len(given))
        if sorted(token for token in tokens if token.isdigit()) != given:
            return False
        try:
            return _Reader(tokens).value() == ground_truth["target"]
        except (ValueError, ZeroDivisionError):
            return False


class _Part(NamedTuple):
    """A part of an expression, and how tightly its last operator binds."""

    value: int
    text: str
    binding: int


def _combined(random: Random, parts: list[_Part], operators: str) -> _Part | None:
    """One expression of all parts, joined two by two at random; None where a value on the way is
    not a whole number above 0."""
    parts = list(parts)
    while len(parts) > 1:
        left = parts.pop(random.randrange(len(parts)))
        right = parts.pop(random.randrange(len(parts)))
        sign = random.choice(operators)
        if sign == "/" and left.value % right.value:
            return None
        value = _apply(sign, left.value, right.value)
        if value <= 0:
            return None
        parts.append(_Part(int(value), *_written(sign, left, right)))
    return parts[0]


def _written(sign: str, left: _Part, right: _Part) -> tuple[str, int]:
    """The text of two parts joined, with the parentheses that it needs, and how it binds."""
    binding = 1 if sign in "+-" else 2
    left_text = f"({left.text})" if left.binding < binding else left.text
    needs = binding + (sign in "-/")  # 5-(3+1) and 8/(4*2), but 5+3-1
    right_text = f"({right.text})" if right.binding < needs else right.text
    return f"{left_text}{sign}{right_text}", binding


def _apply(sign: str, left: Fraction | int, right: Fraction | int) -> Fraction:
    left, right = Fraction(left), Fraction(right)
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    return left * right if sign == "*" else left / right


def _tokens(answer: str, most: int) -> list[str]:
    """The tokens of an expression; none when something else is in it, or more than ``most``."""
    tokens: list[str] = []
    place = 0
    while place < len(answer):
        match = _TOKEN.match(answer, place)
        if not match or len(tokens) == most:
            return []
        tokens.append(match[1])
        place = match.end()
    return tokens


class _Reader:
    """Reads the value of an expression. Raises ValueError when it is none."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = [*tokens, "end"]
        self._place = 0

    def value(self) -> Fraction:
        value = self._sum()
        if self._next() != "end":
            raise ValueError
        return value

    def _sum(self) -> Fraction:
        value = self._product()
        while self._ahead in ("+", "-"):
            value = _apply(self._next(), value, self._product())
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while self._ahead in ("*", "/"):
            value = _apply(self._next(), value, self._factor())
        return value

    def _factor(self) -> Fraction:
        token = self._next()
        if token != "(":
            return Fraction(token)
        value = self._sum()
        if self._next() != ")":
            raise ValueError
        return value

    @property
    def _ahead(self) -> str:
        return self._tokens[self._place]

    def _next(self) -> str:
        token = self._ahead
        self._place += token != "end"
        return token
