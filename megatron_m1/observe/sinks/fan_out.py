"""One sink made of many, of which none can stop a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_m1.errors import InputError
from megatron_m1.observe.sinks.json_lines import JsonLines
from megatron_m1.observe.sinks.sink import Metrics, Sink

if TYPE_CHECKING:
    from megatron_m1.config import LoggerConfig

logger = logging.getLogger(__name__)


class FanOut:
    """Passes each call to each sink; a sink that raises is reported once and then left out."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)

    def add(self, sink: Sink) -> None:
        """From here on it gets everything too."""
        self._sinks.append(sink)

    def log(self, step: int, metrics: Metrics) -> None:
        self._each(lambda sink: sink.log(step, metrics))

    def text(self, step: int, name: str, text: str) -> None:
        self._each(lambda sink: sink.text(step, name, text))

    def close(self) -> None:
        """Close every sink. Safe to call again; later calls of any kind do nothing."""
        self._each(lambda sink: sink.close())
        self._sinks.clear()

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                _report(type(sink).__name__, "failed and gets no more metrics", error)
                with contextlib.suppress(Exception):
                    sink.close()


def open_sinks(
    config: LoggerConfig,
    run_dir: Path,
    total_steps: int,
    run_config: dict[str, Any],
    resumed_step: int | None,
) -> FanOut:
    """Open the JSON lines of a run and the sinks that its configuration asks for.

    Args:
        total_steps: the optimizer step at which the run ends.
        run_config: the whole configuration as plain values, kept with the run by wandb.
        resumed_step: the step of the checkpoint that the run goes on from; None for a new run.
            Records of later steps, left by the interrupted run, are dropped.

    Raises:
        InputError: metrics.jsonl cannot be written. Any other sink that cannot start is reported
            and left out.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        sinks: list[Sink] = [JsonLines(run_dir, resumed_step)]
    except OSError as error:
        raise InputError(f"cannot keep metrics in {run_dir}: {error.strerror}") from error
    for name, wanted, open_sink in (
        ("Console", config.console, lambda: _console(total_steps)),
        ("TensorBoard", config.tensorboard, lambda: _tensorboard(run_dir, resumed_step)),
        ("Wandb", config.wandb != "disabled", lambda: _wandb(config, run_dir, run_config)),
    ):
        if wanted:
            try:
                sinks.append(open_sink())
            except Exception as error:
                _report(name, "cannot start and is left out", error)
    return FanOut(sinks)


def _report(name: str, what: str, error: Exception) -> None:
    logger.warning("metrics sink %s %s: %s: %s", name, what, type(error).__name__, error)


# Each optional sink is imported when it is asked for: its package may be absent, or slow to load.


def _console(total_steps: int) -> Sink:
    from megatron_m1.observe.sinks.console import open_console

    return open_console(total_steps)


def _tensorboard(run_dir: Path, resumed_step: int | None) -> Sink:
    from megatron_m1.observe.sinks.tensorboard import TensorBoard

    return TensorBoard(run_dir, resumed_step)


def _wandb(config: LoggerConfig, run_dir: Path, run_config: dict[str, Any]) -> Sink:
    from megatron_m1.observe.sinks.wandb import Wandb

    return Wandb(config, run_dir, run_config)
