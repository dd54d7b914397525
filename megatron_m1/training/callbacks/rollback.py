"""Takes a run back when its loss spikes."""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque

import torch.distributed as dist

from megatron_m1.checkpoint import store
from megatron_m1.checkpoint.choosing import newest_before
from megatron_m1.config import SpikeConfig
from megatron_m1.observe.sinks import Metrics
from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.callbacks.checkpointer import Checkpointer
from megatron_m1.training.run import Run

# Of the median: losses that hardly differ would make anything a spike.
_LEAST_DEVIATION = 1e-3


class Rollback(Callback[Run]):
    """After ``steps`` losses in a row above median + ``deviations`` x MAD of the last ``window``
    others, goes back to the newest checkpoint whose weights had an ordinary loss, and on from there
    with the rows that follow the spike: what was read since that checkpoint is not read again, as
    in PaLM's training (arXiv 2204.02311, section 5.1). The checkpoint is saved again with the new
    position, so that a restart does not meet the spike either.

    Comes after the checkpointer, which may have saved within the spike.
    """

    def __init__(self, config: SpikeConfig, checkpointer: Checkpointer) -> None:
        self.config = config
        self.checkpointer = checkpointer
        self._losses: deque[float] = deque(maxlen=config.window)
        self._above: list[float] = []
        self._is_over = False

    def on_step(self, run: Run, metrics: Metrics) -> None:
        loss = float(metrics["train/loss"])  # type: ignore[arg-type]
        metrics["train/rollbacks"] = run.progress.rollbacks
        if self._is_over or not math.isfinite(loss):
            return
        limit = self._limit()
        if loss <= limit:
            self._losses.append(loss)
            self._above.clear()
            return
        self._above.append(loss)
        if len(self._above) == self.config.steps:
            self._go_back(run, limit)
            self._above.clear()

    def _limit(self) -> float:
        """What a loss may be; infinite until the window is full."""
        if len(self._losses) < self.config.window:
            return math.inf
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.config.deviations * max(deviation, _LEAST_DEVIATION * median)

    def _go_back(self, run: Run, limit: float) -> None:
        last, first = run.progress.step, run.progress.step - self.config.steps + 1
        highest = max(self._above)
        spike = f"the loss of steps {first} to {last} is above {limit:.4g}, up to {highest:.4g}"
        count = run.progress.rollbacks + 1
        if count > self.config.rollbacks:
            self._is_over = True
            self._tell(run, f"{spike}; train.spike.rollbacks={self.config.rollbacks} are used up")
            return
        self.checkpointer.finish(run)
        # The loss of a step is that of the weights before it.
        with newest_before(run.checkpoint_dir, first - 1, run.config.checkpoint.verify) as path:
            if path is None:
                self._tell(run, f"{spike}; no checkpoint is from before it, training goes on")
                return
            end = run.reader.consumed
            run.finish_parameter_gather()
            store.load(run, path)
        start, run.reader.consumed = run.reader.consumed, end
        run.progress.rollbacks = count
        store.save(run)
        back = f"back to step {run.progress.step}, without rows {start} to {end - 1}"
        self._tell(run, f"{spike}; {back}")

    def _tell(self, run: Run, text: str) -> None:
        run.sinks.text(run.progress.step, "rollback", text)
        if dist.get_rank() == 0:
            print(f"warning: {text}", file=sys.stderr, flush=True)
