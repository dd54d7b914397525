"""The manifest of a checkpoint: the size and the SHA-256 of each of its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "manifest.json"
_THREADS = 4


@dataclass(frozen=True)
class Entry:
    """A file: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


class Damaged(Exception):
    """A file of a checkpoint is not what its manifest says; the text names it."""


def as_bytes(files: dict[str, Entry]) -> bytes:
    """The manifest's file. It carries a hash of itself, so that a flipped bit in it is not taken
    for one in another file."""
    listed = {name: asdict(entry) for name, entry in sorted(files.items())}
    return json.dumps({"version": 1, "sha256": _digest(listed), "files": listed}, indent=1).encode()


def read(folder: Path) -> dict[str, Entry] | None:
    """The files of a checkpoint; None where it has no manifest.

    Raises:
        Damaged: the manifest itself is.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        listed = content["files"]
        if content["sha256"] != _digest(listed):
            raise Damaged(f"{MANIFEST} does not have the hash that it says")
        files = {name: Entry(**values) for name, values in listed.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {type(error).__name__} {error}") from error
    if any(Path(name).name != name for name in files):
        raise Damaged(f"{MANIFEST} names a file outside the folder")
    return files


def share(files: dict[str, Entry], rank: int, size: int) -> list[str]:
    """The files that one of ``size`` processes looks at: about as many bytes for each."""
    loads, mine = [0] * size, []
    for name, entry in sorted(files.items(), key=lambda item: (-item[1].size, item[0])):
        least = loads.index(min(loads))
        loads[least] += entry.size
        if least == rank:
            mine.append(name)
    return mine


def check(folder: Path, files: dict[str, Entry], names: Iterable[str], is_full: bool) -> None:
    """Compare files with the manifest: their sizes, and with ``is_full`` their hashes.

    Raises:
        Damaged: names the first that differs.
    """
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        list(threads.map(lambda name: _check_file(folder / name, files[name], is_full), names))


def _check_file(path: Path, entry: Entry, is_full: bool) -> None:
    try:
        size = path.stat().st_size
        if size != entry.size:
            raise Damaged(f"{path.name} has {size} bytes, not the {entry.size} of {MANIFEST}")
        if is_full:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    raise Damaged(f"{path.name} does not have the SHA-256 of {MANIFEST}")
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error


def _digest(listed: dict[str, dict[str, int | str]]) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
