"""A run and its parts: what the loop, the steps and the callbacks work on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_m1.config import RunConfig
from megatron_m1.data.reader import Reader
from megatron_m1.data.sources import Corpus, open_corpus
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.model.build import build_chunks, wrap_for_training
from megatron_m1.model.transformer_config import transformer_config
from megatron_m1.observe.sinks import FanOut, open_sinks
from megatron_m1.training import phases
from megatron_m1.training.optimizer import build_optimizer


@dataclass
class Progress:
    """How far a run has come. Part of every checkpoint.

    Attributes:
        step: finished optimizer steps.
        tokens: positions of the rows they read.
    """

    step: int = 0
    tokens: int = 0


@dataclass
class Run:
    """Everything that training holds."""

    config: RunConfig
    transformer: TransformerConfig
    chunks: list[nn.Module]
    optimizer: MegatronOptimizer
    corpus: Corpus
    total_tokens: int
    progress: Progress = field(default_factory=Progress)
    sinks: FanOut = field(default_factory=lambda: FanOut([]))

    @property
    def dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def checkpoint_dir(self) -> Path:
        return Path(self.config.checkpoint.dir or self.dir / "checkpoints")

    @property
    def reader(self) -> Reader:
        return self.corpus.train

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.corpus.tokenizer

    @property
    def finished(self) -> bool:
        steps = self.config.train.steps
        if steps is not None:
            return self.progress.step >= steps
        return self.progress.tokens >= self.total_tokens

    def finish_parameter_gather(self) -> None:
        """Bring every weight up to date: with ``overlap_param_gather`` the sharded optimizer's
        result reaches the other ranks only in the next forward pass."""
        if self.config.optim.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)  # type: ignore[operator]

    def open_sinks(self) -> None:
        """Open the metric sinks on the first process; the others log nowhere."""
        if dist.get_rank() == 0:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.sinks = open_sinks(
                self.config.logger,
                self.dir,
                phases.total_steps(self.config.train),
                asdict(self.config),
                self.progress.step or None,
            )


def build_run(config: RunConfig) -> Run:
    """Model, optimizer and data of a run, over Megatron's initialised groups."""
    # Losses of routers that nobody has read: those of a run before this one in the same process.
    clear_aux_losses_tracker()
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed, force_reset_rng=True)
    transformer = transformer_config(
        config.model, config.parallel, config.train, config.train.precision
    )
    chunks = wrap_for_training(
        build_chunks(config.model, transformer, seed=config.seed), transformer, config.optim
    )
    optimizer = build_optimizer(chunks, config.optim, config.train.precision)
    connect_schedule(transformer, chunks)
    return Run(
        config,
        transformer,
        chunks,
        optimizer,
        open_corpus(config.data, config.model.vocab_size, config.train, config.seed),
        phases.total_tokens(config.train),
    )


def connect_schedule(transformer: TransformerConfig, chunks: list[Any]) -> None:
    """Megatron's schedules find the gradient hooks in the model's configuration.

    They also look for `grad_scale_func`, which FP32 and BF16 do not need. The optimizer's own would
    tie model and optimizer to each other through C++, where no garbage collector sees it: process
    groups of an ended run would keep their threads.
    """
    transformer.finalize_model_grads_func = finalize_model_grads
    if chunks[0].ddp_config.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in chunks]
        transformer.no_sync_func = hooks if len(hooks) > 1 else hooks[0]


def data_rank() -> tuple[int, int]:
    """This process's place among those that read different rows, and their number."""
    return (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
