"""Work on many items by one process or by several, with a count of bytes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from megatron_m1.errors import WorkerDied

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Counts bytes that are done."""

_SECONDS = 0.5  # between looks at the other processes

_here: dict[str, Any] = {}
"""What this process works with, where it is a worker."""


def work(
    function: Callable[[Shared, Item, Advance], Result],
    shared: Shared,
    items: Sequence[Item],
    workers: int,
    advance: Advance,
) -> Iterator[Result]:
    """``function(shared, item, advance)`` for each item, as they are finished.

    Args:
        function: of a module, so that another process finds it.
        workers: processes; 1 works in this one.

    Raises:
        WorkerDied: a process ended before its item was finished.
    """
    if workers == 1:
        yield from (function(shared, item, advance) for item in items)
        return
    context = get_context("spawn")
    counter, seen = context.Value("q", 0), 0
    pool = ProcessPoolExecutor(workers, context, _enter, (function, shared, counter, os.getpid()))
    try:
        waiting = {pool.submit(_run, item) for item in items}
        while waiting:
            done, waiting = wait(waiting, _SECONDS, FIRST_COMPLETED)
            now = counter.value
            advance(now - seen)
            seen = now
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise WorkerDied(
            f"one of the {workers} worker processes was killed, as the system does when memory "
            "runs out: the same command with fewer --workers goes on with what is left"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _enter(function: Callable[..., Any], shared: Any, counter: Any, parent: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C on the terminal reaches every process, and one of them says what it means.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _here.update(function=function, shared=shared, counter=counter)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End with the process that started this one, however that ended."""
    while os.getppid() == parent:
        time.sleep(_SECONDS)
    os._exit(1)


def _run(item: Any) -> Any:
    def advance(size: int) -> None:
        with _here["counter"].get_lock():
            _here["counter"].value += size

    return _here["function"](_here["shared"], item, advance)
