"""Progress for a reader: a live bar on a terminal, and plain lines in a log file."""

from __future__ import annotations

import math
import os
import sys
import time
from typing import TextIO

from megatron_m1.observe.sinks.console_line import Pace, format_line, printable
from megatron_m1.observe.sinks.sink import Metrics, Sink

INTERVAL_S = 5.0  # a plain line at most this often: logs of long jobs must stay readable


def open_console(total_steps: int, stream: TextIO | None = None) -> Sink:
    """The sink that suits the stream (standard output if None): live on a terminal, else plain."""
    stream = stream or sys.stdout
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        from megatron_m1.observe.sinks.console_bar import LiveBar

        return LiveBar(total_steps, stream)
    return PlainLines(total_steps, stream)


class PlainLines:
    """A line for the first step, the last step, each evaluation, and every few seconds."""

    def __init__(self, total_steps: int, stream: TextIO, interval_s: float = INTERVAL_S) -> None:
        self._stream, self._total, self._interval_s = stream, total_steps, interval_s
        self._pace = Pace(total_steps)
        self._printed_at = -math.inf
        self._waiting = ""  # the newest line, while it is not printed

    def log(self, step: int, metrics: Metrics) -> None:
        self._pace.mark(step)
        self._waiting = f"{format_line(step, self._total, metrics)} | ETA {self._pace.eta()}"
        due = time.monotonic() - self._printed_at >= self._interval_s
        if due or step >= self._total or "val/loss" in metrics:
            self._print_waiting()

    def text(self, step: int, name: str, text: str) -> None:
        print(f"--- {name}, step {step} ---\n{printable(text)}", file=self._stream, flush=True)

    def close(self) -> None:
        """Print the last step of a run that ends early."""
        if self._waiting:
            self._print_waiting()

    def _print_waiting(self) -> None:
        print(self._waiting, file=self._stream, flush=True)
        self._waiting = ""
        self._printed_at = time.monotonic()
