"""The live progress bar of a terminal."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from megatron_m1.observe.sinks.console_line import Pace, format_fields, format_line, printable
from megatron_m1.observe.sinks.sink import Metrics

LINES = 10  # permanent lines left above the bar in the course of a run
FIELDS = (
    *("critic/rewards/mean", "response_length/mean", "actor/entropy"),
    *("train/loss", "optim/grad_norm", "optim/lr", "perf/tokens_per_s", "perf/mfu"),
)


def _fixed(text: str, width: int) -> TextColumn:
    """A column that a narrow terminal does not cut."""
    return TextColumn(text, table_column=Column(no_wrap=True, min_width=width))


class LiveBar:
    """A bar with the newest numbers; a permanent line per tenth of the run and per evaluation."""

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        self._total = total_steps
        self._pace = Pace(total_steps)
        self._lines = -1
        # The numbers come last, so that a narrow terminal cuts them and not the step or the time.
        self._progress = Progress(
            _fixed(
                "step {task.completed:.0f}/{task.total:.0f}", len(f"step {total_steps}") * 2 - 4
            ),
            BarColumn(bar_width=20, table_column=Column(min_width=10)),
            _fixed("ETA {task.fields[eta]}", len("ETA 0:00:00")),
            TextColumn(
                "{task.fields[numbers]}",
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=Console(file=stream, force_terminal=True),
        )
        self._task = self._progress.add_task("", total=total_steps, eta="?", numbers="")
        self._progress.start()

    def log(self, step: int, metrics: Metrics) -> None:
        self._pace.mark(step)
        self._progress.update(self._task, completed=step, eta=self._pace.eta())
        if numbers := format_fields(metrics, FIELDS):  # an evaluation has none for the bar
            self._progress.update(self._task, numbers="  ".join(numbers))
        lines = step * LINES // self._total
        if lines > self._lines or "val/loss" in metrics:
            self._lines = lines
            self._print(format_line(step, self._total, metrics))

    def text(self, step: int, name: str, text: str) -> None:
        self._progress.console.rule(f"{name}, step {step}", align="left", style="dim")
        self._print(printable(text))

    def close(self) -> None:
        self._progress.stop()

    def _print(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
