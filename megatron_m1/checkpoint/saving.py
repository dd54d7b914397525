"""One checkpoint on its way to disk, while training goes on.

A save has three parts. All processes copy the state to the host; each writes its part into
``step_N.tmp`` in a thread of its own, hashed and flushed; and when all are done, at a point that
all of them reach, the first process adds what describes the whole, renames the folder and moves
``latest``. No thread communicates, so a process that fails or dies is met by the others in
training, or here, and never in the middle of writing.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from megatron_m1.checkpoint import agreement, folders, lease, manifest, retention
from megatron_m1.checkpoint.beside import TOKENIZER
from megatron_m1.checkpoint.disk import (
    flushed,
    require_space,
    sync_folder,
    told_clearly,
    write_file,
)
from megatron_m1.checkpoint.manifest import Entry
from megatron_m1.checkpoint.optimizer_state import LAYOUT
from megatron_m1.checkpoint.state import sharded_training
from megatron_m1.checkpoint.writing import Staged, Written, stage, write_common, write_metadata
from megatron_m1.errors import StorageError

if TYPE_CHECKING:
    from megatron_m1.training.state import Training

T = TypeVar("T")
_LONGEST_PAUSE = 1.0


class Save:
    """The state after a step. Every method is collective.

    Attributes:
        path: where the checkpoint will be.
    """

    def __init__(self, run: Training) -> None:
        """Copy the state and start to write it.

        Raises:
            StorageError: the folder cannot be made, or the disk has too little space.
        """
        self.path = folders.step_folder(run.checkpoint_dir, run.progress.step)
        self._partial = self.path.with_name(self.path.name + folders.PARTIAL)
        self._config = run.config
        self._tokenizer, self._beside = run.tokenizer, run.beside
        self._rank = dist.get_rank()
        self._beat = run.sections.beat
        staged = agreement.everywhere(lambda: _stage(run))
        self._needed = agreement.total(staged.size)
        agreement.on_first(self._make_folder)
        self._written = _in_background(lambda: self._write(staged))
        self._removal = _in_background(lambda: None)

    def is_written(self) -> bool:
        """Whether all processes have written their parts, or failed to."""
        return agreement.all_true(self._written.done())

    def finish(self) -> Path:
        """Wait until all have written, and make it the latest checkpoint.

        Raises:
            StorageError: it could not be written; nothing of it is left, and ``latest`` names the
                one before.
        """
        pause = 0.001
        while not self.is_written():
            # Asking now and then, no process is in a collective for longer than it may last.
            time.sleep(pause)
            self._beat()
            pause = min(2 * pause, _LONGEST_PAUSE)
        try:
            written = agreement.gather(agreement.everywhere(self._written.result))
            agreement.on_first(lambda: self._seal(written or []))
        except StorageError:
            agreement.on_first(lambda: folders.remove([self._partial]))
            raise
        return self.path

    def wait_for_removal(self) -> None:
        """Wait until the checkpoints that this one made superfluous are gone."""
        self._removal.result()

    def _make_folder(self) -> None:
        folder = self.path.parent
        with told_clearly(folder, self.path.name, self._needed):
            folder.mkdir(parents=True, exist_ok=True)
            folders.clear_leftovers(folder)
            require_space(folder, self.path.name, self._needed)
            self._partial.mkdir()

    def _write(self, staged: Staged) -> Written:
        """This process's files."""
        with told_clearly(self.path.parent, self.path.name, self._needed):
            written = staged.write(self._partial, self._rank)
            if self._rank == 0:
                shared = {**write_common(staged, self._partial), **self._write_sources()}
                written = replace(written, files={**written.files, **shared})
            sync_folder(self._partial)
        return written

    def _write_sources(self) -> dict[str, Entry]:
        """What a reader needs beside Megatron's files."""
        config = json.dumps(asdict(self._config), indent=1).encode()
        texts = {**self._beside, folders.CONFIG: config}
        files = {name: write_file(self._partial / name, text) for name, text in texts.items()}
        if self._tokenizer and TOKENIZER not in files:
            self._tokenizer.save(self._partial / TOKENIZER)
            files[TOKENIZER] = flushed(self._partial / TOKENIZER)
        return files

    def _seal(self, written: list[Written]) -> None:
        """Describe the whole, give it its name, and let older ones go."""
        with told_clearly(self.path.parent, self.path.name, self._needed):
            files = {name: entry for part in written for name, entry in part.files.items()}
            files |= write_metadata(written, self._partial)
            write_file(self._partial / manifest.MANIFEST, manifest.as_bytes(files))
            sync_folder(self._partial)
            if lease.is_read(self.path):
                raise StorageError(
                    f"{self.path} is being read by another program and cannot be replaced"
                )
            folders.publish(self._partial, self.path)
        keep = self._config.checkpoint
        surplus = retention.surplus(self.path, keep.keep, keep.keep_every)
        aside = retention.set_aside(surplus)
        self._removal = _in_background(lambda: folders.remove(aside))


def _stage(run: Training) -> Staged:
    run.finish_parameter_gather()
    state = {
        **sharded_training(run, is_loading=False),
        **run.state_dict(),
        "content_metadata": dict(LAYOUT),
    }
    # What the distributed optimizer gives is put together for the checkpoint alone.
    return stage(state, copied="optimizer." if run.config.optim.distributed else None)


def _in_background(action: Callable[[], T]) -> Future[T]:
    """Run it in a thread that does not keep the process from ending."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="checkpoint", daemon=True).start()
    return future
