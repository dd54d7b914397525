"""Training state on disk: Megatron's distributed checkpoints in numbered folders.

A checkpoint holds weights and optimizer state in the coordinates of the whole model, so any layout
can load it, the progress of the run, its position in the data, the configuration and the tokenizer.
No random state: training draws nothing after the weights' start but the data order, which follows
from the seed and the position, and a rollout's draws follow from the seed and the response's place.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from megatron_m1.checkpoint.models import model_differences, saved_config, saved_model
from megatron_m1.checkpoint.optimizer_state import load_optimizer
from megatron_m1.checkpoint.reading import read_state
from megatron_m1.checkpoint.saving import Save
from megatron_m1.checkpoint.state import load_model, sharded_model, sharded_training
from megatron_m1.errors import InputError

if TYPE_CHECKING:
    from megatron_m1.config import CommonConfig
    from megatron_m1.training.state import Training


def save(run: Training) -> Path:
    """Write the state after the current step, and wait for it. Collective.

    Returns:
        The checkpoint's folder.

    Raises:
        StorageError: it could not be written.
    """
    saving = Save(run)
    path = saving.finish()
    saving.wait_for_removal()
    return path


def load(run: Training, path: Path) -> None:
    """Bring a run to the state of a checkpoint that any layout of the same model wrote. Collective.

    Raises:
        InputError: the checkpoint is of another model or of other data.
    """
    _check(path, run.config)
    state = read_state(sharded_training(run, is_loading=True), path)
    load_model(run.chunks, state)
    load_optimizer(run.optimizer, state["optimizer"])
    try:
        run.load_state_dict(state)
    except ValueError as error:
        raise InputError(str(error)) from error


def load_weights(chunks: list[nn.Module], path: Path) -> None:
    """Fill the model chunks alone, for inference. Collective."""
    load_model(chunks, read_state(sharded_model(chunks), path))


def is_of_kind(path: Path, config: CommonConfig) -> bool:
    """Whether a checkpoint was written by the program that ``config`` is for."""
    return ("rl" in saved_config(path)) == hasattr(config, "rl")


def _check(path: Path, config: CommonConfig) -> None:
    """Refuse a checkpoint whose weights or optimizer do not fit this run."""
    differing = model_differences(config.model, saved_model(path), also=["fp32_lm_head"])
    # The base may change with the length of the sequences.
    differing.pop("rope_theta", None)
    if differing:
        raise InputError(f"checkpoint {path} is of another model: {', '.join(differing.values())}")
    distributed = saved_config(path)["optim"]["distributed"]
    if distributed != config.optim.distributed:
        raise InputError(
            f"checkpoint {path} has the state of the optimizer with optim.distributed="
            f"{str(distributed).lower()}: resume with the same"
        )
