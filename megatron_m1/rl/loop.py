"""The loop of RL."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from megatron_m1.errors import NotFinite
from megatron_m1.observe.sinks.sink import scalars
from megatron_m1.rl.learning import learn
from megatron_m1.rl.metrics import Times, step_metrics
from megatron_m1.rl.state import RLRun
from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.stopping import stop_if_asked


def train_rl(run: RLRun, callbacks: Sequence[Callback[RLRun]]) -> None:
    """Roll out, judge and learn until the run's steps are reached.

    Raises:
        NotFinite: a step's loss or gradient norm is not a number; nothing is saved after it.
        Stopped: a signal asked for it; the step before it is saved.
    """
    while not run.finished:
        started = time.perf_counter()
        batch = run.collector.collect(run.progress.step, run.windows.tokens)
        collected = time.perf_counter()
        learned = learn(run, batch.groups, batch.window)
        run.progress.step += 1
        run.progress.tokens += learned.tokens
        trained = time.perf_counter()
        run.engine.weights_changed(run.progress.step)
        metrics = step_metrics(run, batch, learned, Times(started, collected, trained))
        if not all(math.isfinite(value) for value in learned.metrics.values()):
            for callback in callbacks:
                callback.on_stop(run)
            loss, norm = metrics.get("actor/pg_loss"), metrics.get("actor/grad_norm")
            raise NotFinite(
                f"step {run.progress.step}: loss {loss}, gradient norm {norm}: nothing is saved; "
                "lower optim.lr, or look at training/rollout_probs_diff_max of the steps before"
            )
        shown = scalars(metrics)
        if "rollout/perplexity" in shown:
            run.windows.observe(shown["rollout/perplexity"], shown["response_length/p99"])
        for callback in callbacks:
            callback.on_step(run, metrics)
        run.sinks.log(run.progress.step, metrics)
        stop_if_asked(run, callbacks)

    for callback in callbacks:
        callback.on_end(run)
