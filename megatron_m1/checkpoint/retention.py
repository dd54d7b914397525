"""Which checkpoints stay."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron_m1.checkpoint import folders, lease


def surplus(newest: Path, keep: int | None, keep_every: int | None) -> list[Path]:
    """The checkpoints beside ``newest`` that may go.

    Args:
        keep: how many stay, ``newest`` and the next older ones; None keeps all.
        keep_every: those of steps that this divides stay too.
    """
    if keep is None:
        return []
    older = folders.earlier(newest)[keep - 1 :]
    return [path for path in older if not keep_every or folders.step_of(path) % keep_every]


def set_aside(paths: list[Path]) -> list[Path]:
    """Take the names from the checkpoints that nobody reads; returns what is left to remove. One
    that is being read stays for now: the next save asks again."""
    aside = []
    for path in paths:
        with lease.alone(path) as is_alone:
            if is_alone:
                with contextlib.suppress(OSError):
                    aside.append(folders.set_aside(path))
    return aside
