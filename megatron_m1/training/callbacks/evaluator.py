"""Measures the loss on held-out rows."""

from __future__ import annotations

import math

from megatron_m1.observe.sinks import Metrics
from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.run import Run
from megatron_m1.training.step import evaluate, read_rows


class Evaluator(Callback[Run]):
    """Every ``every`` steps, the mean loss over the first ``rows`` held-out rows."""

    def __init__(self, every: int, rows: int) -> None:
        self.every = every
        self.rows = rows

    def on_step(self, run: Run, metrics: Metrics) -> None:
        if run.progress.step % self.every == 0 or run.finished:
            assert run.corpus.valid is not None
            with run.sections.within("evaluation"):
                loss = evaluate(run, read_rows(run, run.corpus.valid, 0, self.rows))
            metrics["val/loss"] = loss
            metrics["val/ppl"] = math.exp(min(loss, 700))
