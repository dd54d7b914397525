"""Saves the training state."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_m1.checkpoint.folders import step_of
from megatron_m1.checkpoint.saving import Save
from megatron_m1.config import CheckpointConfig
from megatron_m1.errors import StorageError
from megatron_m1.observe.sinks import Metrics
from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.state import Training


class Checkpointer(Callback[Training]):
    """Saves every so many steps and, where asked, when training ends. With ``async_save`` the next
    steps run while the disk works; at most one save is on its way."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self._on_its_way: Save | None = None
        self._saved: Save | None = None

    def on_step(self, run: Training, metrics: Metrics) -> None:
        started = time.perf_counter()
        is_due = bool(self.config.every) and run.progress.step % self.config.every == 0
        is_busy = self._on_its_way is not None
        if self._on_its_way and (is_due or self._on_its_way.is_written()):
            with self._told(run):
                self._finish(run)
        if is_due:
            with self._told(run):
                self._start(run)
        if is_due or (is_busy and not self._on_its_way):
            metrics["time/save"] = time.perf_counter() - started

    def on_stop(self, run: Training) -> None:
        self.finish(run)

    def finish(self, run: Training) -> None:
        """Wait for the save on its way. Whether it succeeds changes nothing for who asks."""
        with self._told(run, is_fatal=False):
            self._finish(run)

    def on_pause(self, run: Training) -> None:
        self._close(run, is_saved=True)

    def on_end(self, run: Training) -> None:
        self._close(run, self.config.save_at_end)

    def _close(self, run: Training, is_saved: bool) -> None:
        with self._told(run):
            self._finish(run)
        if is_saved and not self._has_saved(run.progress.step):
            # Nothing comes after it that could make up for it.
            with self._told(run, is_fatal=True):
                self._start(run)
                self._finish(run)
        if self._saved:
            self._saved.wait_for_removal()

    def _has_saved(self, step: int) -> bool:
        return self._saved is not None and step_of(self._saved.path) == step

    def _start(self, run: Training) -> None:
        self._on_its_way = Save(run)
        if not self.config.async_save:
            self._finish(run)

    def _finish(self, run: Training) -> None:
        saving, self._on_its_way = self._on_its_way, None
        if saving:
            run.sinks.text(run.progress.step, "checkpoint", str(saving.finish()))
            self._saved = saving

    @contextmanager
    def _told(self, run: Training, is_fatal: bool | None = None) -> Iterator[None]:
        """Raise a failed save or only tell of it, as ``checkpoint.on_error`` says or as told here.
        All processes have the same error."""
        try:
            with run.sections.within("save"):
                yield
        except StorageError as error:
            if self.config.on_error == "stop" if is_fatal is None else is_fatal:
                raise
            run.sinks.text(run.progress.step, "checkpoint_failed", str(error))
            if dist.get_rank() == 0:
                print(f"warning: {error}; training goes on", file=sys.stderr, flush=True)
