"""Run a function on N gloo processes that many tests share.

``Pool(n)`` starts n processes once (forked from a server that has torch and Megatron imported, so
that starting eight costs seconds) and joins them in one process group; ``pool.run(function, ...)``
calls the function on all of them and returns their results in rank order. A function that raises
on a rank, or takes longer than its limit, fails the test with that rank's traceback and output.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_PRELOAD = ["tests.preload"]
# Megatron's gradient hooks keep a model and its groups alive in C++, and each group keeps threads
# that wake a thousand times a second: after some runs a fresh process is cheaper.
_RUNS = 5


class Pool:
    """N processes in one gloo group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._runs = 0
        self._logs = tempfile.TemporaryDirectory(prefix="ranks-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        port = _free_port()
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, size, port, str(self._log(rank))),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, limit: float = 120) -> list[Any]:
        """Call ``function(*args)`` on every rank; results in rank order.

        Raises:
            AssertionError: a rank raised, died, or did not finish within ``limit`` seconds. The
                pool is then closed, since its ranks may wait for each other for ever.
        """
        self._runs += 1
        for pipe in self._pipes:
            pipe.send((function, args))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            outcome = self._receive(rank, pipe, 1 if failures else limit)
            (failures if outcome[0] == "error" else results).append(outcome[1])
        if failures:
            self.close()
            raise AssertionError("\n\n".join(failures))
        return results

    def _receive(self, rank: int, pipe: Any, limit: float) -> tuple[str, Any]:
        try:
            if pipe.poll(limit):
                return pipe.recv()
            reason = f"did not finish within {limit:.0f} s"
        except EOFError:
            reason = "died"
        return "error", f"rank {rank} {reason}; its output:\n{self._log(rank).read_text()[-4000:]}"

    def _log(self, rank: int) -> Path:
        return Path(self._logs.name) / f"rank{rank}.log"

    @property
    def usable(self) -> bool:
        """Whether it is worth running more on these processes."""
        alive = bool(self._processes) and all(process.is_alive() for process in self._processes)
        return alive and self._runs < _RUNS

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []
        with contextlib.suppress(OSError):
            self._logs.cleanup()


def _serve(pipe: Any, rank: int, size: int, port: int, log: str) -> None:
    """A rank: call what arrives until the pipe closes."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from parallel.layout import close_groups

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=100))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            outcome = ("result", function(*args))
        except BaseException:
            outcome = ("error", f"rank {rank}:\n{traceback.format_exc()}")
        pipe.send(outcome)
        del outcome
        close_groups()
        # Megatron copies each scale into the first one, which has no dimension without a schedule.
        MoEAuxLossAutoScaler.main_loss_backward_scale = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
