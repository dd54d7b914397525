"""A trained model from a checkpoint, for programs that do not train it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.core import tensor_parallel
from torch import nn

from megatron_m1 import launcher
from megatron_m1.checkpoint import store
from megatron_m1.checkpoint.choosing import chosen
from megatron_m1.checkpoint.folders import given_by
from megatron_m1.checkpoint.models import saved_model
from megatron_m1.config import LoadConfig
from megatron_m1.config_checks import model_layout_problems
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.errors import ConfigError, InputError
from megatron_m1.model.build import build_chunks
from megatron_m1.model.config import ModelConfig
from megatron_m1.model.transformer_config import transformer_config
from megatron_m1.runtime import processes
from parallel.layout import Layout


@dataclass
class Loaded:
    """A model ready for forward passes."""

    model: ModelConfig
    chunks: list[nn.Module]
    path: Path


@contextmanager
def trained_model(
    checkpoint: LoadConfig, layout: Layout, precision: str, fp32_lm_head: bool | None = None
) -> Iterator[Loaded]:
    """Load a checkpoint's model into ``layout`` while the processes are joined. A run that makes
    room for newer checkpoints leaves this one until the block ends.

    Args:
        fp32_lm_head: the head's precision where it is not to be the checkpoint's.

    Raises:
        ConfigError: the model does not fit the layout.
        InputError: the checkpoint cannot be read.
    """
    assert checkpoint.load, "programs check that it is given"
    model = saved_model(given_by(checkpoint.load)[0])
    problems = layout.problems(launcher.world_size()) + model_layout_problems(model, layout)
    if problems:
        raise ConfigError(problems)
    with processes(layout), chosen(checkpoint.load, None, checkpoint.verify) as path:
        assert path is not None
        yield load_model(path, layout, precision, fp32_lm_head)


def load_model(
    path: Path, layout: Layout, precision: str, fp32_lm_head: bool | None = None
) -> Loaded:
    """Load a checkpoint's model over the groups that are already built."""
    model = saved_model(path)
    if fp32_lm_head is not None:
        model = replace(model, fp32_lm_head=fp32_lm_head)
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = transformer_config(model, layout, precision=precision)
    chunks = build_chunks(model, config, seed=None)
    store.load_weights(chunks, path)
    return Loaded(model, chunks, path)


def load_tokenizer(path: str | None, eod: str, loaded: Loaded) -> Tokenizer:
    """The tokenizer at ``path``, or the one that the checkpoint holds.

    Raises:
        InputError: it is missing, or has tokens that the model does not know.
    """
    try:
        tokenizer = Tokenizer.load(path or loaded.path, eod)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer={path or 'null'}: {error}") from error
    if tokenizer.vocab_size > loaded.model.vocab_size:
        raise InputError(
            f"tokenizer={path or 'null'} has {tokenizer.vocab_size} tokens, but the checkpoint's "
            f"model knows {loaded.model.vocab_size}: give the tokenizer that it was trained with"
        )
    return tokenizer
