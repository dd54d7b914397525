"""What a task is: problems made from random numbers, and a verifier of answers.

Models of a few million parameters read bytes, so problems and answers are short. Whatever a model
writes up to the last ``#`` is its work; the answer is what follows, or everything where there is no
``#``. It is compared after white space around it is removed, and must be exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Protocol

ANSWER_MARK = "#"


@dataclass(frozen=True)
class Problem:
    """A problem of a task.

    Attributes:
        prompt: what the policy reads.
        answer: a right answer, to teach with.
        ground_truth: what the verifier needs, JSON's values only.
    """

    prompt: str
    answer: str
    ground_truth: Any


class Task(Protocol):
    """A family of problems. Tasks are frozen dataclasses whose fields are the knobs of difficulty;
    they raise ValueError for a knob out of its range."""

    name: ClassVar[str]

    @classmethod
    def at(cls, difficulty: int) -> Task:
        """The task with knobs for a step of difficulty, from 0."""
        ...

    def problem(self, random: Random) -> Problem:
        """A problem that depends on the knobs and the state of ``random`` alone."""
        ...

    @staticmethod
    def is_right(answer: str, ground_truth: Any) -> bool:
        """Whether an answer, without white space around it, is right. Never raises for an answer,
        whatever it holds."""
        ...


class ExactAnswer:
    """A verifier for tasks with one right answer, which is their ground truth."""

    @staticmethod
    def is_right(answer: str, ground_truth: str) -> bool:
        return answer == ground_truth


def final_answer(response: str) -> str:
    """The answer in a response."""
    return response.rpartition(ANSWER_MARK)[2].strip()


def check_knob(task: str, knob: str, value: int, least: int, most: int) -> None:
    """Raises ValueError unless a knob is a whole number from ``least`` to ``most``."""
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{task}: {knob} is {value!r}; give a whole number from {least} to {most}")
