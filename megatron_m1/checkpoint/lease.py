"""Leases: a checkpoint that somebody reads is not removed.

A reader holds a shared lock (flock) on the checkpoint's configuration; who removes or replaces the
checkpoint asks for the only one. The kernel drops the locks of a process that ends, however it
ends. Any program can take part: ``flock --shared STEP/config.json COMMAND``.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_m1.checkpoint.folders import CONFIG
from megatron_m1.errors import InputError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keep a checkpoint while the block runs.

    Raises:
        InputError: it is gone.
    """
    try:
        handle = os.open(path / CONFIG, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    try:
        if _lock(handle, fcntl.LOCK_SH) and not _is_still(handle, path / CONFIG):
            raise InputError(f"checkpoint {path} was removed just now: give another")
        yield
    finally:
        os.close(handle)


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Whether nobody reads a checkpoint; if so, nobody starts to while the block runs. False also
    where the file system knows no locks: then nobody can tell."""
    try:
        handle = os.open(path / CONFIG, os.O_RDWR)
    except OSError:
        yield False
        return
    try:
        yield _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def is_read(path: Path) -> bool:
    """Whether somebody reads a checkpoint for certain."""
    try:
        handle = os.open(path / CONFIG, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    finally:
        os.close(handle)
    return False


def _lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind)
    except OSError:
        return False
    return True


def _is_still(handle: int, path: Path) -> bool:
    """Whether the name still belongs to the file that was opened."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False
