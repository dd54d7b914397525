"""The tensors of a checkpoint to disk, by the process that holds them."""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)


class WriteHere(SaveShardedStrategy):
    """Megatron's ``torch_dist`` format. Megatron's own strategy is made for saving in the
    background: each rank starts a manager process, which imports the program again, and forks
    writers, whose errors reach the other ranks late. Saving is synchronous here."""

    can_handle_sharded_objects = True

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(named),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )
