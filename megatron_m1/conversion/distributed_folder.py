"""The weights of one of our checkpoints, a tensor at a time, by a process that is alone.

``torch.distributed.checkpoint`` normally fills a state dictionary that is in memory, by plans that
all ranks agree on. Its reader takes plans of any size: here a plan is one tensor.
"""

from __future__ import annotations

import math
import pickle
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_m1.checkpoint import manifest
from megatron_m1.checkpoint.unpickling import read_metadata
from megatron_m1.conversion.progress import Bar
from megatron_m1.conversion.safetensors_file import Form
from megatron_m1.errors import InputError

OPTIMIZER = "optimizer."
_TENSORS = ".distcp"


@dataclass
class DistributedFolder:
    """A checkpoint that any layout wrote, in the names of ``families.DISTRIBUTED``."""

    path: Path

    def __getstate__(self) -> dict[str, Path]:
        """Another process reads the table itself."""
        return {"path": self.path}

    @cached_property
    def metadata(self) -> Metadata:
        """Which tensors there are, in which pieces and files."""
        return read_metadata(self.path)

    @property
    def names(self) -> set[str]:
        """The weights, without what only training needs."""
        return {
            name
            for name, stored in self.metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and not name.startswith(OPTIMIZER)
        }

    def files(self) -> set[str]:
        """The files with the weights: of some ranks all is the optimizer's."""
        names = self.names
        places = self.metadata.storage_data
        return {place.relative_path for index, place in places.items() if index.fqn in names}

    def form(self, name: str) -> Form:
        stored = self._stored(name)
        return Form(stored.properties.dtype, tuple(stored.size))

    def read(self, name: str, slot: int | None = None) -> Tensor:
        """A tensor, or part ``slot`` of its first axis.

        Raises:
            InputError: a file is missing or damaged, or the pieces do not cover the tensor.
        """
        form = self.form(name)
        offsets, sizes = [0] * len(form.shape), list(form.shape)
        if slot is not None:
            offsets[0], sizes[0] = slot, 1
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        target = torch.empty(sizes, dtype=form.dtype)
        items = create_read_items_for_chunk_list(name, self._stored(name), [wanted])
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise InputError(f"{self.path} holds only parts of {name}")
        self._read(items, target)
        return target if slot is None else target[0]

    def _read(self, items: list[ReadItem], target: Tensor) -> None:
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            places = self.metadata.storage_data
            files = {places[item.storage_index].relative_path for item in items}
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(
                f"{items[0].dest_index.fqn} cannot be read from {', '.join(sorted(files))} in "
                f"{self.path}, a file is missing or damaged: {first_line}"
            ) from error

    def _stored(self, name: str) -> TensorStorageMetadata:
        stored = self.metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        return stored

    @cached_property
    def _reader(self) -> FileSystemReader:
        reader = FileSystemReader(self.path)
        reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        return reader


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = self._target
        for axis, start in enumerate(read_item.dest_offsets):
            place = place.narrow(axis, start, read_item.lengths[axis])
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def check_files(path: Path, is_full: bool) -> None:
    """Compare with its manifest what a converter reads of a checkpoint: all but the files that hold
    nothing but state of the optimizer. One without a manifest gets a warning.

    Args:
        is_full: hashes too, not only sizes.

    Raises:
        InputError: names the file that differs.
    """
    files = manifest.read(path)
    if files is None:
        print(f"warning: {path} has no {manifest.MANIFEST} to verify it by", file=sys.stderr)
        return
    # The table that says where the weights are comes first.
    manifest.check(path, files, [name for name in files if not name.endswith(_TENSORS)], is_full)
    shards = DistributedFolder(path).files()
    if not is_full:
        manifest.check(path, files, shards, is_full)
        return
    with Bar("verifying", sum(files[name].size for name in shards & files.keys())) as bar:
        manifest.check(path, files, shards, is_full, bar.advance)
