"""Training state on disk: Megatron's distributed checkpoints in numbered folders.

A checkpoint is written to ``step_N.tmp`` and renamed when it is whole; then ``latest`` names it. It
holds weights and optimizer state in the coordinates of the whole model, so any layout can load it,
the progress of the run, the position of the data reader, the configuration and the tokenizer. No
random state: training draws nothing after the weights' start but the data order, which follows
from the seed and the position.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from torch import nn

from megatron_m1.errors import InputError
from megatron_m1.model.build import unwrap
from megatron_m1.model.config import InitConfig, ModelConfig

if TYPE_CHECKING:
    from megatron_m1.training.run import Run

CONFIG = "config.json"
LATEST = "latest"

# Each moment in the shape of its parameter. Megatron 0.16.1's default for the distributed optimizer
# cannot be written ("flattened_range is not supported").
_OPTIMIZER_LAYOUT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def save(run: Run) -> Path:
    """Write the state after the current step. Collective: every process calls it.

    Returns:
        The checkpoint's folder.
    """
    run.finish_parameter_gather()
    final = run.checkpoint_dir / f"step_{run.progress.step:06d}"
    partial = final.with_suffix(".tmp")
    if _is_first():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = {
        **_sharded_model(run.chunks),
        "optimizer": _sharded_optimizer(run, is_loading=False),
        "progress": asdict(run.progress),
        "reader": run.reader.state_dict(),
    }
    dist_checkpointing.save(state, str(partial), content_metadata=_OPTIMIZER_LAYOUT)
    if _is_first():
        (partial / CONFIG).write_text(json.dumps(asdict(run.config), indent=1))
        if run.tokenizer:
            run.tokenizer.save(partial / "tokenizer.json")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _point_latest(final)
    dist.barrier()
    return final


def load(run: Run, path: Path) -> None:
    """Bring a run to the state of a checkpoint that any layout of the same model wrote.

    Raises:
        InputError: the checkpoint is of another model or of other data.
    """
    check_model(path, run.config.model)
    state = _read(
        {
            **_sharded_model(run.chunks),
            "optimizer": _sharded_optimizer(run, is_loading=True),
        },
        path,
    )
    _load_model(run.chunks, state)
    run.optimizer.load_state_dict(state["optimizer"])
    run.progress.step = state["progress"]["step"]
    run.progress.tokens = state["progress"]["tokens"]
    try:
        run.reader.load_state_dict(state["reader"])
    except ValueError as error:
        raise InputError(str(error)) from error


def load_weights(chunks: list[nn.Module], path: Path) -> None:
    """Fill the model chunks alone, for inference."""
    _load_model(chunks, _read(_sharded_model(chunks), path))


def find(where: str | None) -> Path | None:
    """The checkpoint that a path means: itself, or the latest of a folder or of a run.

    Raises:
        InputError: the path is given but holds no checkpoint.
    """
    if where is None:
        return None
    path = Path(where)
    if (path / CONFIG).is_file():
        return path
    found = find_latest(path) or find_latest(path / "checkpoints")
    if found is None:
        raise InputError(
            f"checkpoint.load={where} holds no checkpoint: give a step_N folder, a folder with a "
            f"file named {LATEST}, or a run's folder"
        )
    return found


def find_latest(folder: Path) -> Path | None:
    """The checkpoint that ``latest`` in a folder names, or None."""
    pointer = folder / LATEST
    return folder / pointer.read_text().strip() if pointer.is_file() else None


def saved_model(path: Path) -> ModelConfig:
    """The sizes of the model in a checkpoint."""
    try:
        saved = json.loads((path / CONFIG).read_text())["model"]
        return ModelConfig(**{**saved, "init": InitConfig(**saved["init"])})
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{path / CONFIG} cannot be read as a configuration: {error}") from error


def check_model(path: Path, model: ModelConfig) -> None:
    """Refuse a checkpoint whose weights do not fit the configured model."""
    saved, here = asdict(saved_model(path)), asdict(model)
    # What the weights do not depend on may change between runs.
    free = ("name", "init", "aux_loss_coef", "capacity_factor", "drop_policy")
    differing = [
        f"model.{key}={here[key]} (the checkpoint has {saved[key]})"
        for key in here
        if key not in free and saved[key] != here[key]
    ]
    if differing:
        raise InputError(f"checkpoint {path} is of another model: {', '.join(differing)}")


def _sharded_model(chunks: list[nn.Module]) -> dict[str, Any]:
    return {
        f"model{index}": unwrap(chunk).sharded_state_dict(metadata=_metadata())
        for index, chunk in enumerate(chunks)
    }


def _sharded_optimizer(run: Run, is_loading: bool) -> dict[str, Any]:
    model = _sharded_model(run.chunks)
    # Megatron looks its parameters up in one model's dictionary, or in model0, model1, ...
    return run.optimizer.sharded_state_dict(
        model["model0"] if len(model) == 1 else model, is_loading=is_loading, metadata=_metadata()
    )


def _metadata() -> dict[str, Any]:
    return {
        **_OPTIMIZER_LAYOUT,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _load_model(chunks: list[nn.Module], state: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(state[f"model{index}"])


def _read(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(sharded, str(path))
    except (dist_checkpointing.core.CheckpointingException, OSError, RuntimeError) as error:
        raise InputError(f"checkpoint {path} cannot be read: {error}") from error


def _point_latest(checkpoint: Path) -> None:
    partial = checkpoint.parent / f".{LATEST}.tmp"
    partial.write_text(checkpoint.name)
    os.replace(partial, checkpoint.parent / LATEST)


def _is_first() -> bool:
    return dist.get_rank() == 0
