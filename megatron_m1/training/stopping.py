"""Stopping before the end: a signal asks for it, all processes leave together, the same command
goes on.

SIGTERM (preemption) and SIGUSR1 (the time limit is near) set a flag and nothing else. At the next
step boundary the processes agree on it, so that one signalled process is enough; they save, and the
program ends with `EXIT_STOPPED`, by which a job script knows to queue the job again.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from megatron_m1.errors import Stopped

if TYPE_CHECKING:
    from megatron_m1.training.callbacks.callback import Callback
    from megatron_m1.training.state import Training

    RunT = TypeVar("RunT", bound=Training)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_received: list[str] = []


def listen() -> None:
    """From here on, for the life of this process, the signals only set the flag. Comes first in a
    program: a signal during the minutes in which a large model is built must not kill it. Job
    scripts start it with the signals blocked, so that an earlier one waits until here."""
    _received.clear()
    for number in SIGNALS:
        signal.signal(number, _remember)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _remember(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)


def stop_if_asked(run: RunT, callbacks: Sequence[Callback[RunT]]) -> None:
    """Between two steps: save and leave, if any process was asked to. Collective.

    Raises:
        Stopped: on every process, after the checkpoint of this step is whole.
    """
    names = None if run.finished else _agreed()
    if names is None:
        return
    for callback in callbacks:
        callback.on_pause(run)
    run.sinks.text(run.progress.step, "stopped", names)
    run.sinks.close()
    _wait_for_all()
    _received.clear()
    raise Stopped(
        f"stopped by {names} after step {run.progress.step} of {run.total_steps}: the checkpoint "
        f"is in {run.checkpoint_dir}, and the same command goes on"
    )


def _agreed() -> str | None:
    """The signals that any process has received, on every process."""
    import torch
    import torch.distributed as dist

    from parallel import host

    flags = torch.tensor([float(number.name in _received) for number in SIGNALS])
    flags = flags.to(host.device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    found = [number.name for number, flag in zip(SIGNALS, flags.tolist(), strict=True) if flag]
    return " and ".join(found) or None


def _wait_for_all() -> None:
    """A launcher kills what is left when one process ends, and some close their sinks longer."""
    import torch.distributed as dist

    dist.barrier()
