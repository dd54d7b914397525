"""``close ([{}(=`` -> ``)])``: what closes the brackets that are open."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from megatron_m1.rl.tasks.task import ExactAnswer, Problem, check_knob

_CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


@dataclass(frozen=True)
class Brackets(ExactAnswer):
    """A Dyck word cut off while at least one bracket is open; the shortest end is the answer.

    Attributes:
        length: brackets in the prompt.
        kinds: of brackets, from the front of ``([{<``.
    """

    length: int = 6
    kinds: int = 2
    name: ClassVar[str] = "brackets"

    def __post_init__(self) -> None:
        check_knob(self.name, "length", self.length, 1, 256)
        check_knob(self.name, "kinds", self.kinds, 1, len(_CLOSING))

    @classmethod
    def at(cls, difficulty: int) -> Brackets:
        """2 brackets and one kind, and 2 brackets and a kind more a step."""
        return cls(length=2 * difficulty + 2, kinds=min(difficulty + 1, len(_CLOSING)))

    def problem(self, random: Random) -> Problem:
        opening = list(_CLOSING)[: self.kinds]
        text, expected = "", [""]
        while len(text) < self.length:
            # The last bracket that is open may close, unless that would leave no question.
            may_close = len(expected) > (2 if len(text) == self.length - 1 else 1)
            if may_close and random.random() < 0.5:
                text += expected.pop()
            else:
                bracket = random.choice(opening)
                text += bracket
                expected.append(_CLOSING[bracket])
        answer = "".join(reversed(expected))
        return Problem(f"close {text}=", answer, answer)
