"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from megatron_m1.errors import NotFinite
from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.metrics import step_metrics
from megatron_m1.training.run import Run
from megatron_m1.training.step import train_step
from megatron_m1.training.stopping import stop_if_asked


def train(run: Run, callbacks: Sequence[Callback[Run]]) -> None:
    """Train until the run's steps or tokens are reached.

    Raises:
        NotFinite: a step's loss or gradient norm is not a number; nothing is saved after it.
        Stopped: a signal asked for it; the step before it is saved.
    """
    while not run.finished:
        started = time.perf_counter()
        result = train_step(run)
        seconds = time.perf_counter() - started
        if not math.isfinite(result.loss + result.grad_norm):
            for callback in callbacks:
                callback.on_stop(run)
            raise NotFinite(
                f"step {run.progress.step}: loss {result.loss}, gradient norm {result.grad_norm}: "
                "nothing is saved; lower optim.lr or look at the data of this step"
            )
        metrics = step_metrics(run, result, seconds)
        for callback in callbacks:
            callback.on_step(run, metrics)
        run.sinks.log(run.progress.step, metrics)
        stop_if_asked(run, callbacks)

    for callback in callbacks:
        callback.on_end(run)
