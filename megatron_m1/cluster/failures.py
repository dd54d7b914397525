"""What failed in a job of many processes, and where it began.

Each process that fails leaves its traceback as ``rank_N.json`` in the folder that the job names in
``M1_ATTEMPT``. When one fails the others fail after it, within milliseconds and with other words,
and Slurm keeps the exit code of the last: the summary names the first.

    python -m megatron_m1.cluster.failures FOLDER
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_m1 import launcher
from megatron_m1.errors import Stopped
from megatron_m1.files import whole

FOLDER_VARIABLE = "M1_ATTEMPT"
_SHOWN = 5


@dataclass(frozen=True)
class Failure:
    """The end of one process.

    Attributes:
        error: one line.
        details: traceback; empty for a process that was killed.
        seconds: when it happened, since the epoch.
    """

    rank: int
    host: str
    error: str
    details: str
    seconds: float


def record(error: BaseException) -> None:
    """Leave this process's failure for the summary, where a job asks for it. The first one stays:
    what follows while groups are left says less."""
    if isinstance(error, Stopped | SystemExit):
        return
    details = "".join(traceback.format_exception(error))
    keep(launcher.rank(), f"{type(error).__name__}: {error}", details)


def keep(rank: int, error: str, details: str = "") -> None:
    """Leave the failure of a process, unless it left one itself."""
    folder = os.environ.get(FOLDER_VARIABLE)
    path = Path(folder or "") / f"rank_{rank:05}.json"
    if not folder or path.exists():
        return
    found = Failure(rank, socket.gethostname(), error, details, time.time())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            partial.write_text(json.dumps(asdict(found)))
    except OSError as problem:
        # The failure itself must still reach the log.
        print(f"warning: {path} cannot be written: {problem}", file=sys.stderr)


def read(folder: Path) -> list[Failure]:
    """All failures, the one that began it first: a process that was killed goes before those that
    could still speak, for they noticed its end before its launcher did."""
    found = [Failure(**json.loads(path.read_text())) for path in sorted(folder.glob("rank_*.json"))]
    return sorted(found, key=lambda failure: (bool(failure.details), failure.seconds))


def summary(folder: Path) -> str:
    """The first failure whole, and a line for each of the next ones."""
    found = read(folder)
    if not found:
        return (
            "no process left a traceback: it was killed, or failed before Python started; see above"
        )
    first, others = found[0], found[1:]
    lines = [
        f"rank {first.rank} on {first.host} failed first: {first.error}",
        *first.details.splitlines(),
    ]
    for failure in others[:_SHOWN]:
        after = failure.seconds - first.seconds
        error = (failure.error.splitlines() or [""])[0]
        lines.append(f"rank {failure.rank} on {failure.host}, {after:+.1f} s: {error[:160]}")
    if len(others) > _SHOWN:
        lines.append(f"and {len(others) - _SHOWN} more in {folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))
