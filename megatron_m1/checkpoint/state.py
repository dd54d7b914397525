"""A run's state as Megatron writes and reads it: in the coordinates of the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from megatron_m1.checkpoint.optimizer_state import metadata, sharded_optimizer
from megatron_m1.model.build import unwrap

if TYPE_CHECKING:
    from megatron_m1.training.state import Training


def sharded_model(chunks: list[nn.Module]) -> dict[str, Any]:
    """The weights of the model chunks, as ``model0``, ``model1``, ..."""
    return {
        f"model{index}": unwrap(chunk).sharded_state_dict(metadata=metadata())
        for index, chunk in enumerate(chunks)
    }


def sharded_training(run: Training, is_loading: bool) -> dict[str, Any]:
    """Weights and optimizer. Collective."""
    model = sharded_model(run.chunks)
    return {**model, "optimizer": sharded_optimizer(run.optimizer, model, is_loading)}


def load_model(chunks: list[nn.Module], state: dict[str, Any]) -> None:
    """Take over the weights that were read for ``sharded_model``."""
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(state[f"model{index}"])
