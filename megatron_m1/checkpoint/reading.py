"""A checkpoint's state from disk: Megatron's ``torch_dist`` format without its unpickling."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from megatron_m1.checkpoint.agreement import on_first
from megatron_m1.checkpoint.unpickling import (
    explained,
    read_common,
    read_metadata,
    read_plain,
    refusal,
)

_EXTRA_STATE = "._extra_state"


def read_state(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    """Fill the tensors of a sharded state from a checkpoint, and return all that it holds.
    Collective.

    Raises:
        InputError: the checkpoint is damaged, or holds what could run code.
    """
    metadata, common = on_first(lambda: (read_metadata(path), read_common(path)))
    try:
        with _without_warnings():
            return dist_checkpointing.load(sharded, str(path), ReadHere(metadata), _Common(common))
    except CheckpointException as error:
        # What the first of the ranks that failed met.
        reason: BaseException = next(iter(error.failures.values()))[0]
    except (CheckpointingException, OSError, RuntimeError, ValueError, TypeError) as error:
        reason = error
    raise explained(reason, path)


class ReadHere(LoadShardedStrategy):
    """Megatron's ``torch_dist`` format, described by a ``.metadata`` that was read safely before:
    Megatron's own strategy has torch unpickle it again."""

    can_handle_sharded_objects = True

    def __init__(self, metadata: Metadata) -> None:
        super().__init__()
        self._metadata = metadata

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> StateDict:
        tensors = [
            value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)
        ]
        named, flat, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        wanted = mcore_to_pyt_state_dict(named, is_loading=True)
        torch_checkpoint.load(
            wanted,
            storage_reader=_Reader(checkpoint_dir, self._metadata),
            planner=_Planner(Path(checkpoint_dir), tensors),
        )
        found = {key: _unwrap_pyt_sharded_tensor(value) for key, value in wanted.items()}
        state = _replace_sharded_keys_with_state_dict_keys(found, flat, renamed)
        _restore_dict_types(state, sharded_state_dict)
        return state

    def load_tensors_metadata(self, checkpoint_dir: Path) -> ShardedStateDict:
        raise NotImplementedError("the program asks for no such listing")

    load_sharded_metadata = load_tensors_metadata

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        if loaded_backend != "torch_dist":
            raise CheckpointingException(f"its format is {loaded_backend}, not torch_dist")

    def check_version_compatibility(self, loaded_version: int) -> None:
        if loaded_version != 1:
            raise CheckpointingException(f"its format has version {loaded_version}, not 1")


class _Reader(torch_checkpoint.FileSystemReader):
    """Torch's reader, which is told what ``.metadata`` says."""

    def __init__(self, path: str | Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Planner(MCoreLoadPlanner):
    """Megatron's planner, which torch would let unpickle objects of any kind."""

    def __init__(self, path: Path, tensors: list[ShardedTensor]) -> None:
        super().__init__(
            shapes_validation_sharded_tensors=[
                tensor for tensor in tensors if not tensor.allow_shape_mismatch
            ],
            allow_shape_mismatch_sharded_tensors={
                tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch
            },
        )
        self._path = path

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        found = read_plain(value, self._path / name)
        if _EXTRA_STATE in name and any(_is_filled(part) for part in found):
            # Transformer Engine keeps its FP8 scales as a pickle, which it would unpickle itself.
            raise refusal(self._path / name, "a pickle within a tensor")
        self.original_state_dict[name] = found


def _is_filled(part: Any) -> bool:
    return part is not None and not (torch.is_tensor(part) and part.numel() == 0)


class _Common(TorchCommonLoadStrategy):
    """What is already read."""

    def __init__(self, common: StateDict) -> None:
        self._common = common

    def load_common(self, checkpoint_dir: str | Path) -> StateDict:
        return self._common


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Megatron 0.16.1 calls torch's distributed checkpoints by names that torch will retire."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
