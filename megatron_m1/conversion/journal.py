"""A folder that is written over hours: which of its files are finished survives a kill.

The folder is ``OUT.partial`` until it is whole. Its journal is a line of JSON for the job and one
for each finished file with size and SHA-256, flushed after the file itself.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_m1.checkpoint import manifest
from megatron_m1.checkpoint.disk import sync_folder
from megatron_m1.conversion.progress import Bar
from megatron_m1.conversion.workers import Advance
from megatron_m1.errors import InputError

JOURNAL = ".journal.jsonl"


@dataclass(frozen=True)
class Record:
    """A finished file.

    Attributes:
        content: what its target needs to know of it, as JSON.
    """

    file: str
    size: int
    sha256: str
    content: list[Any]


class Journal:
    """The finished files of a job, open for more. One process at a time.

    Attributes:
        folder: ``OUT.partial``.
        records: the finished files by name.
    """

    def __init__(self, out: Path, job: dict[str, Any]) -> None:
        """Begin, or go on where the same job was broken off.

        Args:
            job: what the content follows from.

        Raises:
            InputError: another job was begun there, or is still running, or ``out`` is taken.
        """
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        if (out / JOURNAL).exists():
            # Killed between the last two steps of ``publish``.
            out.rename(self.folder)
        _refuse_taken(out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / JOURNAL
        self._file = self._path.open("a+b")
        self._lock()
        lines = self._lines()
        if not lines:
            self._append({"job": job})
        elif lines[0].get("job") != json.loads(json.dumps(job)):
            raise InputError(
                f"{self.folder} was begun from other weights or with other options: remove it, or "
                "give the same again to go on"
            )
        self.records = self._intact([Record(**line) for line in lines[1:]])

    def add(self, record: Record) -> None:
        """Note a file whose content is on the disk."""
        self._append(asdict(record))
        self.records[record.file] = record

    def publish(self) -> None:
        """Give the whole folder its name."""
        if self.out.exists():
            self.out.rmdir()
        sync_folder(self.folder)
        self.folder.rename(self.out)
        # Not before: killed in between, it would be begun again from nothing.
        (self.out / self._path.name).unlink()
        sync_folder(self.out.parent)
        self.close()

    def close(self) -> None:
        """Let another process go on."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self.folder} is being written by another process") from error
        except OSError:
            # A file system without locks, as of many clusters: then nobody can tell.
            return

    def _lines(self) -> list[dict[str, Any]]:
        """Those that were written to their end; a kill may leave half of the last one."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def _intact(self, written: list[Record]) -> dict[str, Record]:
        """Those whose files are as they were written, the last of each."""
        found = {record.file: record for record in written}
        if not found:
            return {}
        with Bar("checking what is there", sum(record.size for record in found.values())) as bar:
            return {
                name: record
                for name, record in found.items()
                if _is_intact(record, self.folder, bar.advance)
            }

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def refuse_unfinished(folder: Path) -> None:
    """
    Raises:
        InputError: the folder is of a conversion that has not come to its end.
    """
    if (folder / JOURNAL).exists():
        raise InputError(
            f"{folder} is of a conversion that is not finished: the same command goes on with it"
        )


def _refuse_taken(out: Path) -> None:
    if out.is_symlink() or out.is_mount():
        raise InputError(
            f"{out} is a link or a mount point, in whose place no finished folder can be put: "
            "give a folder in it"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is no empty folder: give another or remove it")


def _is_intact(record: Record, folder: Path, advance: Advance) -> bool:
    try:
        entry = manifest.Entry(record.size, record.sha256)
        manifest.check(folder, {record.file: entry}, [record.file], is_full=True, advance=advance)
    except manifest.Damaged:
        return False
    return True
