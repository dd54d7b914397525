"""Looking at folders of checkpoints, and spoiling what lies there."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

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


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.command = f"touch {proof}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def change_metadata(checkpoint: Path, change: Callable[[Metadata], object]) -> None:
    """Rewrite ``.metadata`` with whatever ``change`` makes of it, and the manifest with it."""
    path = checkpoint / ".metadata"
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes()))))
    describe_anew(checkpoint)


def plant_in_metadata(proof: Path) -> Callable[[Metadata], Metadata]:
    """For ``change_metadata``."""

    def change(metadata: Metadata) -> Metadata:
        metadata.planner_data = Planted(proof)
        return metadata

    return change


def put_in(checkpoint: Path, is_wanted: Callable[[str], bool], content: object) -> None:
    """Let an entry of ``.metadata`` lead to other content in a file of tensors."""
    stream = io.BytesIO()
    torch.save(content, stream)
    tensors = min(checkpoint.glob("*.distcp"))
    start = tensors.stat().st_size
    with tensors.open("ab") as file:
        file.write(stream.getvalue())

    def change(metadata: Metadata) -> Metadata:
        index = next(index for index in metadata.storage_data if is_wanted(index.fqn))
        metadata.storage_data[index] = _StorageInfo(tensors.name, start, len(stream.getvalue()))
        return metadata

    change_metadata(checkpoint, change)
