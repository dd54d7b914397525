"""How the run of a program ended, and what keeps it from running at all."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_m1.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: its exit status, 128 and the signal's number where a signal ended it; None where it
            was stopped.
        stopped: the limit at which it was stopped: seconds, memory, processes or output.
        stdout, stderr: what it printed, up to the limit.
    """

    status: int | None
    stopped: str | None
    stdout: bytes
    stderr: bytes
    seconds: float


class SandboxFailed(Exception):
    """The sandbox, not the program in it, came to grief: nothing is known about the program."""


class SandboxUnavailable(UserError):
    """No sandbox can be started on this machine; the text says why and what would allow it."""
