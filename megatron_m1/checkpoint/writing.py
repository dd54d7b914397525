"""The tensors of a checkpoint to disk, each by the process that holds it, in Megatron's
``torch_dist`` format.

Megatron's own strategy starts a manager process on each rank, which imports the program again and
forks writers, whose errors reach the other ranks late. Here a rank copies what it writes to the
host (``stage``) and any thread of the process may then write it (``Staged.write``).
"""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_m1.checkpoint.disk import HashedFile, write_file
from megatron_m1.checkpoint.folders import METADATA
from megatron_m1.checkpoint.manifest import Entry
from megatron_m1.checkpoint.unpickling import COMMON

# What torch.save adds to a tensor.
_OVERHEAD = 1600


@dataclass(frozen=True)
class Written:
    """What one process wrote: its plan, where each item lies, and its files."""

    plan: SavePlan
    items: list[WriteResult]
    files: dict[str, Entry]


class Staged:
    """One process's part of a checkpoint, on the host.

    Attributes:
        common: what is not a tensor, as a file.
    """

    def __init__(self, planner: MCoreSavePlanner, common: bytes) -> None:
        self.common = common
        self._planner = planner
        self._plan: SavePlan = planner.create_local_plan()

    @property
    def size(self) -> int:
        """Bytes on the disk, to within a few."""
        return sum(_size(item, self._planner) + _OVERHEAD for item in self._plan.items)

    def write(self, folder: Path, rank: int) -> Written:
        """Write the tensors and flush them to the disk."""
        name = f"__{rank}_0.distcp"
        if not self._plan.items:
            return Written(self._plan, [], {})
        with HashedFile(folder / name) as file:
            items = [_write_item(file, item, self._planner) for item in self._plan.items]
        return Written(self._plan, items, {name: file.entry})


def stage(state: dict[str, Any], copied: str | None) -> Staged:
    """Copy to the host what this process writes. Collective.

    Args:
        state: Megatron's sharded state and plain values.
        copied: the start of the names of tensors that nothing else refers to.
    """
    tensors, common = save_preprocess(state)
    named, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    for shards in named.values():
        for shard in shards:
            if isinstance(shard, ShardedTensor) and not (copied and shard.key.startswith(copied)):
                shard.data = _to_host(shard.data)
    planner = MCoreSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(named), is_coordinator=True)
    buffer = io.BytesIO()
    torch.save(common, buffer)
    return Staged(planner, buffer.getvalue())


def write_common(staged: Staged, folder: Path) -> dict[str, Entry]:
    """Write what is stored once for all processes."""
    form = json.dumps(asdict(CheckpointingConfig("torch_dist"))).encode()
    return {
        COMMON: write_file(folder / COMMON, staged.common),
        CONFIG_FNAME: write_file(folder / CONFIG_FNAME, form),
    }


def write_metadata(written: list[Written], folder: Path) -> dict[str, Entry]:
    """Write where each tensor of all processes lies."""
    planner = MCoreSavePlanner(flatten_state_dict=False)
    planner.set_up_planner({}, is_coordinator=True)
    _, metadata = planner.create_global_plan([part.plan for part in written])
    metadata.version = CURRENT_DCP_VERSION
    metadata.storage_meta = StorageMeta()
    metadata.storage_data = {
        item.index: item.storage_data for part in written for item in part.items
    }
    return {METADATA: write_file(folder / METADATA, pickle.dumps(metadata))}


def _to_host(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


def _size(item: WriteItem, planner: MCoreSavePlanner) -> int:
    data = planner.resolve_data(item)
    return data.getbuffer().nbytes if isinstance(data, io.BytesIO) else data.nbytes


def _write_item(file: HashedFile, item: WriteItem, planner: MCoreSavePlanner) -> WriteResult:
    start = file.tell()
    data = planner.resolve_data(item)
    if isinstance(data, io.BytesIO):
        file.write(data.getbuffer())
    else:
        # Of a view, torch.save would write everything that it is a view of.
        is_view = data.untyped_storage().nbytes() != data.nbytes
        torch.save(data.clone() if is_view else data, file)
    length = file.tell() - start
    return WriteResult(item.index, length, _StorageInfo(file.path.name, start, length))
