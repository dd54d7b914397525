"""Files that are hashed while they are written and are on the disk when they are closed, and what
is said when the disk does not take them."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_m1.checkpoint.manifest import Entry
from megatron_m1.errors import StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT)


class HashedFile:
    """A new file for one pass of writing; it is flushed to the disk when the block ends well.

    Attributes:
        failure: the first error of the disk. A writer above may replace it by one of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure: OSError | None = None
        self._file = path.open("wb", buffering=0)
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> int:
        left = memoryview(data).cast("B")
        length = len(left)
        self._hash.update(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._size += length
        return length

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing is held back."""

    @property
    def entry(self) -> Entry:
        return Entry(self._size, self._hash.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                os.fsync(self._file.fileno())
        if self.failure is not None and error is not self.failure:
            raise self.failure from None


def write_file(path: Path, data: bytes) -> Entry:
    """Write a file and flush it to the disk."""
    with HashedFile(path) as file:
        file.write(data)
    return file.entry


def flushed(path: Path) -> Entry:
    """Flush a file that somebody else wrote to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return Entry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in the place of another in one move that a crash cannot halve."""
    partial = path.with_name(f".{path.name}.tmp")
    write_file(partial, data)
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems keep names without being asked and refuse to be.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def require_space(folder: Path, name: str, needed: int) -> None:
    """Raise StorageError where ``needed`` bytes would not fit the file system of ``folder``."""
    free = _free(folder)
    if free is not None and free < needed:
        raise StorageError(_full(folder, name, needed))


@contextmanager
def told_clearly(folder: Path, name: str, needed: int | None = None) -> Iterator[None]:
    """Turn what the disk says into one sentence.

    Args:
        name: what is written.
        needed: its bytes, where they are known.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(_full(folder, name, needed)) from error
        reason = error.strerror or str(error)
        if error.errno == errno.EFBIG:
            reason += ": a file may not grow so large here (see ulimit -f)"
        raise StorageError(f"{name} cannot be written to {folder}: {reason}") from error


def _full(folder: Path, name: str, needed: int | None) -> str:
    free = _free(folder)
    numbers = [f"it needs {readable(needed)}"] if needed else []
    numbers += [f"{readable(free)} are free"] if free is not None else []
    return f"{name} cannot be written to {folder}: the disk is full: {', '.join(numbers)}"


def _free(folder: Path) -> int | None:
    """Bytes that this user may still write; None where the file system does not know."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def readable(size: int) -> str:
    """A size as people write it: 1.5 GB."""
    value, units = float(size), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}" if units[0] != "bytes" else f"{size} bytes"
