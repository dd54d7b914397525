"""What ``fault`` may ask for, and how it is written; no torch is needed to check it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_FORM = re.compile(r"(?P<kind>\w+)@(?P<step>\d+)(:(?P<rank>\d+))?")

KINDS = (
    *("sigkill", "sigstop", "sigterm", "sigusr1", "exception", "hang", "slow"),
    *("nan_loss", "nan_gradient", "read_error", "tracker_down"),
    *("disk_full", "bit_flip", "truncate"),
)
# In these a process neither works nor ends, which only the watchdog sees.
_HANGS = ("sigstop", "hang")


@dataclass(frozen=True)
class Fault:
    """A fault of one process, at the beginning of a step."""

    kind: str
    step: int
    rank: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.step}:{self.rank}"


def parse(text: str) -> Fault:
    """Read KIND@STEP or KIND@STEP:RANK; without a rank it is the first process.

    Raises:
        ValueError: it is neither.
    """
    found = _FORM.fullmatch(text)
    if not found:
        raise ValueError(f"fault={text} is not of the form KIND@STEP:RANK, for example sigkill@5:1")
    return Fault(found["kind"], int(found["step"]), int(found["rank"] or 0))


def fault_problems(texts: Sequence[str], world_size: int, watchdog_seconds: float) -> list[str]:
    """What is wrong with a list of faults, one sentence each."""
    found, seen = [], set()
    for text in texts:
        try:
            fault = parse(text)
        except ValueError as error:
            found.append(str(error))
            continue
        if fault.kind not in KINDS:
            found.append(f"fault={text}: {fault.kind} is not one of {', '.join(KINDS)}")
        if fault.step < 1:
            found.append(f"fault={text}: steps count from 1")
        if fault.rank >= world_size:
            found.append(f"fault={text}: there are {world_size} processes, from 0 on")
        if fault in seen:
            found.append(f"fault={text} is given twice, but a fault is made once")
        if fault.kind in _HANGS and not watchdog_seconds:
            found.append(f"fault={text} hangs for ever without train.watchdog_seconds")
        seen.add(fault)
    return found
