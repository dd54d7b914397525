"""What a verifier is and what it may say: verl's signature and results."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class ComputeScore(Protocol):
    """verl's signature. It may also be a coroutine function."""

    def __call__(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: dict[str, Any] | None = None,
    ) -> Any:
        """A number, or a dictionary whose ``score`` is one."""
        ...


@dataclass(frozen=True)
class Verdict:
    """A score and what else was reported in numbers."""

    score: float
    details: dict[str, float] = field(default_factory=dict)


class VerifierFailed(Exception):
    """A verifier cannot say anything about a response: it is left out, and counted."""


def call(compute_score: ComputeScore, request: Mapping[str, Any]) -> Verdict:
    """The verdict on a request, whose keys are the names of verl's arguments.

    Raises:
        VerifierFailed: what came back is no score.
    """
    result = compute_score(**request)
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    return as_verdict(result)


def as_verdict(result: Any) -> Verdict:
    """A verdict from a number, or from a dictionary: its ``score`` and its other numbers."""
    values = dict(result) if isinstance(result, Mapping) else {"score": result}
    numbers = {str(name): _number(value) for name, value in values.items()}
    score = numbers.pop("score", None)
    if score is None or not math.isfinite(score):
        raise VerifierFailed(f"the score {values.get('score')!r} is not a finite number")
    return Verdict(score, {name: number for name, number in numbers.items() if number is not None})


def _number(value: Any) -> float | None:
    """A float, also of numbers of numpy and torch; None for what is not a number."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
