"""How programs are kept apart, and what they may use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

KINDS = ("bubblewrap", "rlimits")


@dataclass
class SandboxConfig:
    """What stands between a program and this machine.

    Attributes:
        kind: bubblewrap (namespaces: no network, no files but the system's programs, read only), or
            rlimits, which limits what a program uses and does not keep it from files or network.
        python: the interpreter of programs; null is the system's ``python3``.
        readable: more files and folders that programs may read, under their own names.
    """

    kind: str = "bubblewrap"
    python: str | None = None
    readable: list[str] = field(default_factory=list)


@dataclass
class Limits:
    """What a program and all that it starts may use; it is stopped where it goes beyond.

    Attributes:
        seconds: on the clock.
        cpu_seconds: of processor time, in each process.
        memory_mb: resident memory of all processes, and address space of each.
        processes: at a time, threads included.
        output_kb: what it may print.
        files_mb: what it may write; with ``rlimits`` the size of a file.
    """

    seconds: float = 20.0
    cpu_seconds: int = 10
    memory_mb: int = 512
    processes: int = 16
    output_kb: int = 1024
    files_mb: int = 64

    def problems(self, key: str) -> Iterator[str]:
        """What is wrong with the section ``key``."""
        for item in fields(self):
            if getattr(self, item.name) <= 0:
                yield f"{key}.{item.name}={getattr(self, item.name)} must be positive"
