"""What happens beside the steps."""

from __future__ import annotations

from typing import Generic, TypeVar

from megatron_m1.observe.sinks import Metrics
from megatron_m1.training.state import Training

RunT = TypeVar("RunT", bound=Training, contravariant=True)


class Callback(Generic[RunT]):
    """A part beside the steps. Every process calls every callback, so they may communicate."""

    def before_step(self, run: RunT) -> None:
        """Before a step reads its rows."""

    def on_step(self, run: RunT, metrics: Metrics) -> None:
        """After a step, before its record is written; may add to ``metrics``."""

    def on_stop(self, run: RunT) -> None:
        """Training ends early, at the same step and for the same reason on every process."""

    def on_pause(self, run: RunT) -> None:
        """A signal ends the program after this step; another program is to go on from here."""

    def on_end(self, run: RunT) -> None:
        """After the last step."""
