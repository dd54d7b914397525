"""A trained model from a checkpoint, for programs that do not train it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron.core import tensor_parallel
from torch import nn

from megatron_m1 import runtime
from megatron_m1.checkpoint import store
from megatron_m1.config import CheckpointConfig, model_layout_problems
from megatron_m1.errors import ConfigError
from megatron_m1.model.build import build_chunks
from megatron_m1.model.config import ModelConfig
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout


@dataclass
class Loaded:
    """A model ready for forward passes."""

    model: ModelConfig
    chunks: list[nn.Module]
    path: Path


@contextmanager
def trained_model(
    checkpoint: CheckpointConfig, layout: Layout, precision: str
) -> Iterator[Loaded]:
    """Load the checkpoint's model into ``layout`` while the processes are joined.

    Raises:
        ConfigError: no checkpoint is named, or its model does not fit the layout.
        InputError: the checkpoint cannot be read.
    """
    path = store.find(checkpoint.load)
    if path is None:
        raise ConfigError(["checkpoint.load is missing: give checkpoint.load=FOLDER"])
    model = store.saved_model(path)
    problems = layout.problems(runtime.world_size()) or model_layout_problems(model, layout)
    if layout.vpp:
        problems.append(f"parallel.vpp={layout.vpp}: virtual stages serve training only, use null")
    if problems:
        raise ConfigError(problems)
    with runtime.processes(layout):
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        config = transformer_config(model, layout, precision=precision)
        chunks = build_chunks(model, config, seed=None)
        store.load_weights(chunks, path)
        yield Loaded(model, chunks, path)
