"""Saves the training state."""

from __future__ import annotations

from megatron_m1.checkpoint import store
from megatron_m1.observe.sinks import Metrics
from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.run import Run


class Checkpointer(Callback):
    """Saves every ``every`` steps (0: never) and, where asked, when training ends."""

    def __init__(self, every: int, at_end: bool) -> None:
        self.every = every
        self.at_end = at_end
        self.saved_step = -1

    def on_step(self, run: Run, metrics: Metrics) -> None:
        if self.every and run.progress.step % self.every == 0:
            self._save(run)

    def on_end(self, run: Run) -> None:
        if self.at_end and run.progress.step != self.saved_step:
            self._save(run)

    def _save(self, run: Run) -> None:
        path = store.save(run)
        self.saved_step = run.progress.step
        run.sinks.text(run.progress.step, "checkpoint", str(path))
