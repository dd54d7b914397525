"""The manifest of a checkpoint: the size and the SHA-256 of each of its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_m1.errors import InputError

MANIFEST = "manifest.json"
_THREADS = 4
_READ = 2**22  # bytes that are hashed at a time


@dataclass(frozen=True)
class Entry:
    """A file: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


class Damaged(InputError):
    """A file of a checkpoint is not what its manifest says."""

    @classmethod
    def of(cls, folder: Path, what: str) -> Damaged:
        return cls(f"checkpoint {folder} is damaged: {what}")


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
            raise Damaged.of(folder, f"{MANIFEST} does not have the hash that it says")
        files = {name: Entry(**values) for name, values in listed.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{MANIFEST} cannot be read: {type(error).__name__} {error}"
        raise Damaged.of(folder, reason) from error
    if any(Path(name).name != name for name in files):
        raise Damaged.of(folder, f"{MANIFEST} names a file outside the folder")
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


def check(
    folder: Path,
    files: dict[str, Entry],
    names: Iterable[str],
    is_full: bool,
    advance: Callable[[int], object] = lambda size: None,
) -> None:
    """Compare files with the manifest: their sizes, and with ``is_full`` their hashes.

    Args:
        advance: is told of bytes that were hashed, by several threads.

    Raises:
        Damaged: names the first that differs.
    """
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        list(threads.map(lambda name: _check(folder / name, files, is_full, advance), names))


def _check(
    path: Path, files: dict[str, Entry], is_full: bool, advance: Callable[[int], object]
) -> None:
    try:
        entry, size = files[path.name], path.stat().st_size
        if size != entry.size:
            what = f"{path.name} has {size} bytes, not the {entry.size} of {MANIFEST}"
            raise Damaged.of(path.parent, what)
        if is_full and _sha256(path, advance) != entry.sha256:
            raise Damaged.of(path.parent, f"{path.name} does not have the SHA-256 of {MANIFEST}")
    except KeyError:
        raise Damaged.of(path.parent, f"{path.name} is not in {MANIFEST}") from None
    except FileNotFoundError:
        raise Damaged.of(path.parent, f"{path.name} is missing") from None
    except OSError as error:
        raise Damaged.of(path.parent, f"{path.name} cannot be read: {error.strerror}") from error


def _sha256(path: Path, advance: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _digest(listed: dict[str, dict[str, int | str]]) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
