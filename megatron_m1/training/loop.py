"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Sequence

from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.metrics import step_metrics
from megatron_m1.training.not_finite import stop_or_skip
from megatron_m1.training.run import Run
from megatron_m1.training.step import train_step
from megatron_m1.training.stopping import stop_if_asked


def train(run: Run, callbacks: Sequence[Callback[Run]]) -> None:
    """Train until the run's steps or tokens are reached.

    Raises:
        NotFinite: too many steps in a row had a loss or gradient that is not finite.
        Stopped: a signal asked for it; the step before it is saved.
    """
    while not run.finished:
        for callback in callbacks:
            callback.before_step(run)
        started = time.perf_counter()
        result = train_step(run)
        seconds = time.perf_counter() - started
        if not result.is_finite:
            stop_or_skip(run, result, callbacks)
        step, metrics = run.progress.step, step_metrics(run, result, seconds)
        for callback in callbacks:
            callback.on_step(run, metrics)
        run.sinks.log(step, metrics)
        stop_if_asked(run, callbacks)

    for callback in callbacks:
        callback.on_end(run)
