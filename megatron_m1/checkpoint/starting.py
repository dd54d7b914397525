"""How a run starts from a checkpoint: it goes on, or it begins anew with imported weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_m1.checkpoint import agreement, store
from megatron_m1.checkpoint.beside import carried
from megatron_m1.checkpoint.models import is_imported, model_differences, saved_model
from megatron_m1.errors import InputError

if TYPE_CHECKING:
    from megatron_m1.training.state import Training


def start(run: Training, path: Path) -> str:
    """Bring a run to what a checkpoint holds. Its tokenizer's files and those of its import go into
    the run's own checkpoints. Collective.

    Imported weights have no optimizer, step or position of the data, and those of another program
    (RL after pretraining) mean nothing here: the run begins at step 0 with fresh moments.

    Returns:
        What was done, in words.

    Raises:
        InputError: the checkpoint is damaged, or of another model or other data.
    """
    if dist.get_rank() == 0:
        run.beside = agreement.everywhere(lambda: carried(path, run.tokenizer))
    else:
        agreement.everywhere(lambda: None)
    imported = is_imported(path)
    if not imported and store.is_of_kind(path, run.config):
        store.load(run, path)
        return f"{path}: going on from step {run.progress.step}"
    differing = model_differences(run.config.model, saved_model(path))
    # The base may change with the length of the sequences.
    base = differing.pop("rope_theta", None)
    if differing:
        raise InputError(f"checkpoint {path} is of another model: {', '.join(differing.values())}")
    store.load_weights(run.chunks, path)
    # The FP32 copies that the optimizer works on.
    run.optimizer.reload_model_params()
    begun = f"{path}: a new run from {'imported' if imported else 'its'} weights"
    return f"{begun}, with another base of rotation: {base}" if base else begun
