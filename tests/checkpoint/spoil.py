"""Looking at folders of checkpoints, and spoiling what lies there."""

from __future__ import annotations

from pathlib import Path

from megatron_m1.checkpoint import manifest
from megatron_m1.checkpoint.disk import flushed


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def describe_anew(checkpoint: Path) -> None:
    """Give a checkpoint the manifest of the files that it has now, as who made them would."""
    files = [path for path in checkpoint.iterdir() if path.name != manifest.MANIFEST]
    entries = {path.name: flushed(path) for path in files}
    (checkpoint / manifest.MANIFEST).write_bytes(manifest.as_bytes(entries))
