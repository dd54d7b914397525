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
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_m1.checkpoint.optimizer_state import (
    LAYOUT,
    load_optimizer,
    metadata,
    sharded_optimizer,
)
from megatron_m1.checkpoint.writing import WriteHere
from megatron_m1.config_reading import read_section
from megatron_m1.errors import InputError
from megatron_m1.model.build import unwrap
from megatron_m1.model.config import ModelConfig

if TYPE_CHECKING:
    from megatron_m1.config import RunConfig
    from megatron_m1.training.run import Run

CONFIG = "config.json"
LATEST = "latest"
# Keys of the model that the weights do not depend on: they may change between runs.
_FREE = ("name", "init", "rope_theta", "aux_loss_coef", "capacity_factor", "drop_policy")


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
        **_sharded_training(run, is_loading=False),
        "progress": asdict(run.progress),
        "reader": run.reader.state_dict(),
    }
    with _without_warnings():
        dist_checkpointing.save(state, str(partial), WriteHere(), content_metadata=LAYOUT)
    if _is_first():
        (partial / CONFIG).write_text(json.dumps(asdict(run.config), indent=1))
        if run.tokenizer:
            run.tokenizer.save(partial / "tokenizer.json")
        _publish(partial, final)
    dist.barrier()
    return final


def _publish(partial: Path, final: Path) -> None:
    """Give a whole checkpoint its name, in place of one that has it, and point ``latest`` at it."""
    replaced = final.with_suffix(".old")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    pointer = final.parent / f".{LATEST}.tmp"
    pointer.write_text(final.name)
    os.replace(pointer, final.parent / LATEST)
    shutil.rmtree(replaced, ignore_errors=True)


def load(run: Run, path: Path) -> None:
    """Bring a run to the state of a checkpoint that any layout of the same model wrote.

    Raises:
        InputError: the checkpoint is of another model or of other data.
    """
    _check(path, run.config)
    state = _read(_sharded_training(run, is_loading=True), path)
    _load_model(run.chunks, state)
    load_optimizer(run.optimizer, state["optimizer"])
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
    """The checkpoint that ``latest`` in a folder names, or None.

    Raises:
        InputError: it names one that is not there.
    """
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    path = folder / pointer.read_text().strip()
    replaced = path.with_suffix(".old")
    if not path.exists() and (replaced / CONFIG).is_file():
        # A save was killed while it put a new checkpoint in the place of this one.
        return replaced
    if not (path / CONFIG).is_file():
        raise InputError(f"{pointer} names {path.name}, but that is not a whole checkpoint")
    return path


def choose(load: str | None, own: Path) -> Path | None:
    """Where a run starts: the latest of its ``own`` folder, else ``load``. A step folder in ``own``
    that ``load`` names outright goes before the latest. Collective: the first process looks, since
    a shared file system may show the others an older folder."""
    chosen: list[Path | InputError | None] = [None]
    if _is_first():
        try:
            given, latest = find(load), find_latest(own)
            is_own = given is not None and given.resolve().parent == own.resolve()
            chosen = [given if is_own else latest or given]
        except InputError as error:
            chosen = [error]
    dist.broadcast_object_list(chosen, src=0)
    (path,) = chosen
    if isinstance(path, InputError):
        raise path
    return path


def saved_model(path: Path) -> ModelConfig:
    """The sizes of the model in a checkpoint."""
    problems: list[str] = []
    model = read_section(ModelConfig, _saved_config(path).get("model"), "model", problems)
    if problems:
        raise InputError(f"{path / CONFIG} does not describe a model: {', '.join(problems)}")
    return model


def _saved_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path / CONFIG} cannot be read as a configuration: {error}") from error


def _check(path: Path, config: RunConfig) -> None:
    """Refuse a checkpoint whose weights or optimizer do not fit this run."""
    saved, here = asdict(saved_model(path)), asdict(config.model)
    differing = [
        f"model.{key}={here[key]} (the checkpoint has {saved[key]})"
        for key in here
        if key not in _FREE and saved[key] != here[key]
    ]
    if differing:
        raise InputError(f"checkpoint {path} is of another model: {', '.join(differing)}")
    distributed = _saved_config(path)["optim"]["distributed"]
    if distributed != config.optim.distributed:
        raise InputError(
            f"checkpoint {path} has the state of the optimizer with optim.distributed="
            f"{str(distributed).lower()}: resume with the same"
        )


def _sharded_model(chunks: list[nn.Module]) -> dict[str, Any]:
    return {
        f"model{index}": unwrap(chunk).sharded_state_dict(metadata=metadata())
        for index, chunk in enumerate(chunks)
    }


def _sharded_training(run: Run, is_loading: bool) -> dict[str, Any]:
    model = _sharded_model(run.chunks)
    return {**model, "optimizer": sharded_optimizer(run.optimizer, model, is_loading)}


def _load_model(chunks: list[nn.Module], state: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(state[f"model{index}"])


def _read(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        with _without_warnings():
            return dist_checkpointing.load(sharded, str(path))
    except CheckpointException as error:
        # What the first of the ranks that failed met.
        reason: BaseException = next(iter(error.failures.values()))[0]
    except (CheckpointingException, OSError, RuntimeError) as error:
        reason = error
    first_line = next(iter(str(reason).splitlines()), "")
    raise InputError(
        f"checkpoint {path} cannot be read, a file is missing or damaged: "
        f"{type(reason).__name__} {first_line}"
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Megatron 0.16.1 calls torch's distributed checkpoints by names that torch will retire."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _is_first() -> bool:
    return dist.get_rank() == 0
