"""What happens beside the steps."""

from __future__ import annotations

from megatron_m1.observe.sinks import Metrics
from megatron_m1.training.run import Run


class Callback:
    """A part beside the steps. Every process calls every callback, so they may communicate."""

    def on_step(self, run: Run, metrics: Metrics) -> None:
        """After a step, before its record is written; may add to ``metrics``."""

    def on_stop(self, run: Run) -> None:
        """Training ends early, at the same step and for the same reason on every process."""

    def on_end(self, run: Run) -> None:
        """After the last step."""
