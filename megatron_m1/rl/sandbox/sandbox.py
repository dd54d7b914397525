"""The interface of sandboxes, and the one that a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO, Protocol

from megatron_m1.rl.sandbox.bubblewrap import Bubblewrap
from megatron_m1.rl.sandbox.config import KINDS, Limits, SandboxConfig
from megatron_m1.rl.sandbox.outcome import Outcome, SandboxFailed, SandboxUnavailable
from megatron_m1.rl.sandbox.rlimits import RLimits

_PROBE = ("-I", "-c", "print(6 * 7)")


class Sandbox(Protocol):
    """Runs a program at a time; several threads or processes may each have one.

    Attributes:
        python: the interpreter, by its path within the sandbox.
        remedy: what to do where it cannot be started.
    """

    python: str
    remedy: str

    def run(
        self,
        command: Sequence[str],
        limits: Limits,
        *,
        files: Mapping[str, bytes | BinaryIO] | None = None,
        stdin: bytes = b"",
    ) -> Outcome:
        """Run a command in a private folder that is gone when it ends, with all that it started.

        Args:
            files: what lies in the folder's ``input/``, by name.

        Raises:
            SandboxFailed: the sandbox did not run the command, or lost it.
        """
        ...


def open_sandbox(config: SandboxConfig) -> Sandbox:
    """A sandbox that has run a program.

    Raises:
        SandboxUnavailable: it cannot here.
    """
    if config.kind not in KINDS:
        raise SandboxUnavailable(
            f"reward.sandbox.kind={config.kind} is not one of {', '.join(KINDS)}"
        )
    sandbox: Sandbox = Bubblewrap(config) if config.kind == "bubblewrap" else RLimits(config)
    try:
        outcome = sandbox.run((sandbox.python, *_PROBE), Limits())
    except SandboxFailed as error:
        raise SandboxUnavailable(f"{error}; {sandbox.remedy}") from error
    if outcome.stdout != b"42\n":
        said = outcome.stderr.decode(errors="replace").strip() or f"status {outcome.status}"
        raise SandboxUnavailable(
            f"{sandbox.python} does not run in the sandbox reward.sandbox.kind={config.kind}: "
            f"{said}; give an interpreter that every user may read: reward.sandbox.python=..."
        )
    return sandbox
