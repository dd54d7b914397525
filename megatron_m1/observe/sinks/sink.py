"""What every sink can do."""

from __future__ import annotations

from typing import Protocol

Metrics = dict[str, float | list]


class Sink(Protocol):
    """A place that metrics go to. Any method may raise: `FanOut` then goes on without the sink."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Record flat, named values of one optimizer step.

        A value is a number, or a list (of lists) of numbers, which a sink may skip.
        """

    def text(self, step: int, name: str, text: str) -> None:
        """Record a piece of text, such as a sample from the model."""

    def close(self) -> None:
        """Write out what is pending. Nothing is logged afterwards."""


def scalars(metrics: Metrics) -> dict[str, float]:
    """The metrics that are single numbers, as Python numbers."""
    return {name: float(value) for name, value in metrics.items() if not isinstance(value, list)}
