"""How each fault is made. A maker is called at the beginning of a step on the process that the
fault is of; it acts at once, or lays a trap that springs once within the step or the next save."""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_m1.checkpoint.disk import HashedFile
from megatron_m1.checkpoint.folders import from_latest
from megatron_m1.observe.sinks import Metrics
from megatron_m1.training.run import Run
from megatron_m1.training.state import Training

SLOW_SECONDS = 2.0
_FOR_EVER = 86400.0


class Injected(Exception):
    """The fault ``exception``."""


def send(number: signal.Signals) -> Callable[[Training], None]:
    return lambda run: os.kill(os.getpid(), number)


def raise_exception(run: Training) -> None:
    raise Injected("a fault that was asked for")


def spoil_loss(run: Run) -> None:
    def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor:
        once.remove()
        return output * math.nan

    once = run.chunks[-1].register_forward_hook(spoil)


def spoil_gradient(run: Run) -> None:
    def spoil(module: Any, inputs: Any, output: Tensor) -> None:
        once.remove()
        output.register_hook(lambda gradient: gradient * math.nan)

    once = run.chunks[-1].register_forward_hook(spoil)


def delay(run: Run) -> None:
    def wait(module: Any, inputs: Any) -> None:
        once.remove()
        time.sleep(SLOW_SECONDS)

    once = run.chunks[0].register_forward_pre_hook(wait)


def hang(run: Run) -> None:
    """The others wait for this process's part of the gradient."""
    run.transformer.finalize_model_grads_func = lambda *args, **kwargs: time.sleep(_FOR_EVER)


def fail_to_read(run: Run) -> None:
    def fail(index: int) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "the file of the rows")

    run.reader.sample = fail  # type: ignore[method-assign]


def fill_disk(run: Training) -> None:
    """The next write to a checkpoint finds no space."""
    write = HashedFile.write

    def full(file: HashedFile, data: bytes | memoryview) -> int:
        HashedFile.write = write  # type: ignore[method-assign]
        file.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise file.failure

    HashedFile.write = full  # type: ignore[method-assign, assignment]


def lose_tracker(run: Training) -> None:
    run.sinks.add(_Unreachable())


class _Unreachable:
    def log(self, step: int, metrics: Metrics) -> None:
        raise ConnectionError("the tracker does not answer")

    def text(self, step: int, name: str, text: str) -> None:
        raise ConnectionError("the tracker does not answer")

    def close(self) -> None:
        """Nothing was opened."""


def flip_bit(run: Training) -> None:
    path = _largest_file(run)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.kill(os.getpid(), signal.SIGKILL)


def truncate(run: Training) -> None:
    path = _largest_file(run)
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def _largest_file(run: Training) -> Path:
    newest = from_latest(run.checkpoint_dir)[0]
    return max(newest.iterdir(), key=lambda path: path.stat().st_size)


def has_two_checkpoints(run: Training) -> bool:
    """One to damage, and one to go back to."""
    return len(from_latest(run.checkpoint_dir)) > 1


MAKERS: dict[str, Callable[[Any], None]] = {
    "sigkill": send(signal.SIGKILL),
    "sigstop": send(signal.SIGSTOP),
    "sigterm": send(signal.SIGTERM),
    "sigusr1": send(signal.SIGUSR1),
    "exception": raise_exception,
    "nan_loss": spoil_loss,
    "nan_gradient": spoil_gradient,
    "slow": delay,
    "hang": hang,
    "read_error": fail_to_read,
    "disk_full": fill_disk,
    "tracker_down": lose_tracker,
    "bit_flip": flip_bit,
    "truncate": truncate,
}
# What must hold before; until then the fault waits for a later step.
CONDITIONS: dict[str, Callable[[Training], bool]] = {
    "bit_flip": has_two_checkpoints,
    "truncate": has_two_checkpoints,
}
