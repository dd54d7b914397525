"""One of our checkpoints written a file at a time, each tensor made when its turn comes.

Any number of processes may write files; one of them then writes the table that makes the files a
checkpoint. The format is that of ``torch.distributed.checkpoint``, whose own writer wants to know
all ranks and hold what each of them writes.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_m1.checkpoint.disk import HashedFile, write_file
from megatron_m1.checkpoint.folders import METADATA
from megatron_m1.checkpoint.manifest import Entry
from megatron_m1.checkpoint.unpickling import COMMON
from megatron_m1.conversion.safetensors_file import Form

_FORMAT = "metadata.json"


@dataclass(frozen=True)
class Part:
    """What to write: a tensor, or the part ``slot`` of its first axis, and what makes it."""

    name: str
    slot: int | None
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Written:
    """A tensor, a part of one or an object in a file: what a checkpoint's table says of it.

    Attributes:
        offsets: of the part in the tensor; None for an object.
        start: the place in the file, as ``length`` in bytes.
    """

    name: str
    offsets: Sequence[int] | None
    start: int
    length: int


def file_name(number: int) -> str:
    """The file that a rank of this number would write."""
    return f"__{number}_0.distcp"


def write_parts(
    path: Path, parts: Sequence[Part], forms: Mapping[str, Form]
) -> tuple[list[Written], Entry]:
    """Write one file, flushed to the disk.

    Args:
        forms: the whole tensors that the parts belong to.
    """
    written = []
    with HashedFile(path) as file:
        for part in parts:
            start, tensor = file.tell(), part.make()
            torch.save(tensor if part.slot is None else tensor[None], file)
            offsets = [part.slot or 0, *(0 for _ in forms[part.name].shape[1:])]
            written.append(Written(part.name, offsets, start, file.tell() - start))
    return written, file.entry


def write_table(
    folder: Path, forms: Mapping[str, Form], files: Mapping[str, Sequence[Written]]
) -> dict[str, Entry]:
    """Write what a loader asks for beside the tensors: the empty states of the linear layers, in a
    file of their own, and the table.

    Args:
        files: what each file holds.
    """
    last = file_name(len(files))
    states, entry = _write_states(folder / last, _empty_states(forms))
    table = Metadata(
        {name: _described(form) for name, form in forms.items()}
        | {state.name: BytesStorageMetadata() for state in states},
        storage_data={},
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    for file, written in {**files, last: states}.items():
        for one in written:
            place = _StorageInfo(file, one.start, one.length)
            table.storage_data[MetadataIndex(one.name, one.offsets)] = place
            stored = table.state_dict_metadata[one.name]
            if one.offsets is not None and isinstance(stored, TensorStorageMetadata):
                stored.chunks.append(_chunk(forms[one.name], one.offsets))
    return {last: entry, METADATA: write_file(folder / METADATA, pickle.dumps(table))}


def write_common(folder: Path, state: dict[str, Any]) -> dict[str, Entry]:
    """Write what Megatron keeps beside the tensors: plain values, and the name of the format."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{backend}_version": 1 for backend in backends}
    return {
        COMMON: write_file(folder / COMMON, buffer.getvalue()),
        _FORMAT: write_file(folder / _FORMAT, json.dumps({**backends, **versions}).encode()),
    }


def _described(form: Form) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(form.dtype), torch.Size(form.shape), [])


def _chunk(form: Form, offsets: Sequence[int]) -> ChunkStorageMetadata:
    """Matrices are stored whole, stacked ones one by one."""
    sizes = (1, *form.shape[1:]) if len(form.shape) == 3 else form.shape
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def _empty_states(forms: Mapping[str, Form]) -> Iterator[str]:
    """Megatron asks every linear layer for its FP8 scales, and stores that there are none."""
    for name, form in forms.items():
        layer, _, matrix = name.rpartition(".linear_")
        if layer:
            count = form.shape[0] if len(form.shape) == 3 else 1
            key = f"{layer}.linear_{matrix.removesuffix('.weight')}._extra_state"
            yield from (f"{key}/shard_{number}_{count}" for number in range(count))


def _write_states(path: Path, names: Iterator[str]) -> tuple[list[Written], Entry]:
    written = []
    with HashedFile(path) as file:
        for name in names:
            start = file.tell()
            torch.save([None], file)
            written.append(Written(name, None, start, file.tell() - start))
    return written, file.entry
