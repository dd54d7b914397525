"""torchrun for jobs that may be stopped: one on each node.

    python -m megatron_m1.cluster.agent --nnodes 2 --node-rank 0 ... -m megatron_m1.pretrain ...

Takes the arguments of ``torch.distributed.run``, and differs from it in two ways. SIGTERM and
SIGUSR1 are passed on to the processes, which save and leave by themselves, for however long that
takes (torchrun kills them after 30 seconds, and dies of SIGUSR1 without them). And it ends with the
exit code of the process that failed first instead of 1, so that a job script knows what to do.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import psutil

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_KILLED = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the processes of this node; the exit code."""
    # Before torch, which takes seconds to import.
    for number in _SIGNALS:
        signal.signal(number, _pass_on)

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    args = parse_args(sys.argv[1:] if arguments is None else list(arguments))
    args.signals_to_handle = "SIGINT"
    try:
        run(args)
    except ChildFailedError as error:
        return _exit_code(error.failures)
    finally:
        # The end of another node's agent makes Slurm signal this one, whose exit code is settled.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    processes = psutil.Process().children()
    if not processes:
        # Nothing has begun that could be saved, or all of it has ended.
        sys.exit(_KILLED + number)
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _exit_code(failed: dict[int, Any]) -> int:
    """That of the process that failed first. Those that were killed could not say so themselves."""
    from megatron_m1.cluster import failures

    for rank, failure in failed.items():
        if failure.exitcode < 0 and -failure.exitcode not in _SIGNALS:
            failures.keep(rank, f"ended by {signal.Signals(-failure.exitcode).name}")
    code: int = min(failed.values(), key=lambda failure: failure.timestamp).exitcode
    return code if code >= 0 else _KILLED - code


if __name__ == "__main__":
    sys.exit(main())
