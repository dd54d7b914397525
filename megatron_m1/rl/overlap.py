"""Batches that are drawn and judged while those before them are trained on.

The first process collects in a thread, which makes no collective call; all processes get a finished
batch by one broadcast when they come for it. A batch is begun once the engine's weights are no more
than ``max_staleness`` versions older than those it will be trained at, and all of its responses are
drawn after that: no token is older.
"""

from __future__ import annotations

import math
import threading
import time
from itertools import count
from queue import Empty, Queue
from typing import Any, Self

import torch.distributed as dist

from megatron_m1.checkpoint import agreement
from megatron_m1.errors import UserError
from megatron_m1.rl.collecting import Batch, Collector
from megatron_m1.rl.rollout.engine import RemoteEngine

# The other processes wait in a collective for no longer than this.
_HEARTBEAT = 20.0


class OverlappedCollector:
    """What ``Collector`` is, up to ``max_staleness`` batches ahead. A context manager.

    Args:
        collector: of ``engine.responses``, and ``alone``: it works on the first process.
        steps: of the run; no batch is begun for a later one.
    """

    def __init__(
        self, collector: Collector, engine: RemoteEngine, max_staleness: int, steps: int
    ) -> None:
        self._collector, self._engine = collector, engine
        self._max_staleness, self._steps = max_staleness, steps
        self._state = collector.state_dict()
        self._end: int | None = None  # batches of the steps before it may be begun
        self._windows: Queue[int] = Queue()  # of those batches
        self._collected: Queue[tuple[Batch, dict[str, Any]] | BaseException] = Queue()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread. What the engine has begun by then is waited for, judged and kept."""
        if self._thread:
            self._closing.set()
            self._engine.stop()
            self._windows.put(0)  # which it may wait for
            self._thread.join()

    def collect(self, step: int, window: int) -> Batch:
        """The batch of the step that follows ``step`` finished ones. Collective.

        Args:
            window: tokens that a response may have, of the batches that are not begun yet.

        Raises:
            Exception: that of the thread, on every process.
        """
        if self._end is None:
            self._begin(step)
        self._allow(step, window)
        collected = None
        while collected is None:
            collected = agreement.on_first(self._next)
        batch, self._state = collected
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Of the collector after the batch that was taken last: those that are under way are begun
        again, from the responses that their journals hold."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._collector.load_state_dict(state)
        self._state = state

    def _begin(self, step: int) -> None:
        self._engine.open()
        self._end = step
        if dist.get_rank() == 0:
            self._thread = threading.Thread(
                target=self._work, args=(step,), name="collecting", daemon=True
            )
            self._thread.start()

    def _allow(self, step: int, window: int) -> None:
        """Let the thread begin the batches that the weights of a version are good enough for."""
        assert self._end is not None
        end = min(step + self._max_staleness + 1, self._steps)
        for _ in range(self._end, end):
            self._windows.put(window)
        self._end = end

    def _next(self) -> tuple[Batch, dict[str, Any]] | None:
        """What the thread has collected; None where that takes longer."""
        try:
            collected = self._collected.get(timeout=_HEARTBEAT)
        except Empty:
            return None
        if isinstance(collected, BaseException):
            raise collected
        return collected

    def _work(self, first: int) -> None:
        """What the thread does."""
        try:
            for step in count(first):
                asked = time.perf_counter()
                window = self._windows.get()
                if self._closing.is_set():
                    return
                held = time.perf_counter() - asked
                batch = self._collector.collect(step, window)
                batch.held_seconds = held
                _require_logprobs(batch)
                self._collected.put((batch, self._collector.state_dict()))
        except BaseException as error:
            self._collected.put(error)


def _require_logprobs(batch: Batch) -> None:
    """What older weights drew counts by their probability of it, which nobody can compute again.

    Raises:
        UserError: the engine does not tell it.
    """
    for group in batch.groups:
        for response in group.in_order:
            if response.tokens and all(map(math.isnan, response.raw_logprobs)):
                raise UserError(
                    "rl.max_staleness above 0 needs the log-probabilities of the policy that drew, "
                    "and the engine does not tell them: use 0"
                )
