"""Compares how fast the processes are."""

from __future__ import annotations

import socket
import statistics
import sys

import torch
import torch.distributed as dist

from megatron_m1.observe.sinks import Metrics
from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.run import Run
from parallel import host

# What a process does by itself; in the other sections the fast ones wait for the slow.
_OWN = ("time/data", "time/forward_backward")


class Stragglers(Callback[Run]):
    """Every ``every`` steps, the seconds that the slowest process spent on its own work over the
    median of all; from ``factor`` on it is named. With tensor, pipeline or expert parallelism
    processes wait for each other within their own work, which hides part of the difference."""

    def __init__(self, every: int, factor: float) -> None:
        self.every = every
        self.factor = factor
        self._spent = [0.0] * len(_OWN)
        self._steps = 0

    def on_step(self, run: Run, metrics: Metrics) -> None:
        self._spent = [
            spent + float(metrics[name])  # type: ignore[arg-type]
            for spent, name in zip(self._spent, _OWN, strict=True)
        ]
        self._steps += 1
        if self._steps < self.every:
            return
        self._compare(run, metrics)
        self._spent, self._steps = [0.0] * len(_OWN), 0

    def _compare(self, run: Run, metrics: Metrics) -> None:
        mine = torch.tensor(self._spent, device=host.device(), dtype=torch.float64)
        gathered = mine.new_empty(dist.get_world_size() * len(_OWN))
        dist.all_gather_into_tensor(gathered, mine)
        every = gathered.view(-1, len(_OWN))
        seconds = every.sum(dim=1).tolist()
        median, slowest = statistics.median_low(seconds), max(seconds)
        rank = seconds.index(slowest)
        metrics["perf/slowest_rank"] = rank
        metrics["perf/slowest_over_median"] = slowest / median
        if slowest < self.factor * median or dist.get_rank() != rank:
            return
        usual = every.quantile(0.5, dim=0, interpolation="lower").tolist()
        parts = ", ".join(
            f"{name} {own / self.every:.3g} s, median {others / self.every:.3g} s"
            for name, own, others in zip(_OWN, self._spent, usual, strict=True)
        )
        print(
            f"warning: rank {rank} on {socket.gethostname()} is slow: its own work took "
            f"{slowest / median:.2g} times the median in the last {self.every} steps; in each of "
            f"them {parts}",
            file=sys.stderr,
            flush=True,
        )
