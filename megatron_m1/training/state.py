"""A model in training: what any run holds, and what checkpoints, sinks and callbacks know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
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

from megatron_m1.config import CommonConfig, ComputeConfig
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.model.build import build_chunks, wrap_for_training
from megatron_m1.model.transformer_config import transformer_config
from megatron_m1.observe.sinks import FanOut, open_sinks
from megatron_m1.training.optimizer import build_optimizer
from megatron_m1.training.sections import Sections


@dataclass
class Progress:
    """How far a run has come. Part of every checkpoint.

    Attributes:
        step: finished steps: of the optimizer in pretraining, rollout batches in RL.
        tokens: positions of the rows they read, or in RL tokens of the responses trained on.
        skipped: steps that left the weights as they were, for want of a finite loss and gradient.
        skipped_in_a_row: of those, the last ones.
        rollbacks: how often a spike of the loss took the run back.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0

    def count(self, is_finite: bool) -> None:
        """Whether the last step had a finite loss and gradient."""
        self.skipped += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1


@dataclass
class Training(ABC):
    """A model in training.

    Attributes:
        tokenizer: what the data was written with, where that is known.
        beside: on the first process, files that every checkpoint keeps from where the run began
            (``checkpoint.beside``).
    """

    config: CommonConfig
    transformer: TransformerConfig
    chunks: list[nn.Module]
    optimizer: MegatronOptimizer
    tokenizer: Tokenizer | None = field(default=None, kw_only=True)
    progress: Progress = field(default_factory=Progress, kw_only=True)
    beside: dict[str, bytes] = field(default_factory=dict, kw_only=True)
    sinks: FanOut = field(default_factory=lambda: FanOut([]), kw_only=True)
    sections: Sections = field(default_factory=Sections, kw_only=True)

    def __post_init__(self) -> None:
        self.transformer.finalize_model_grads_func = _reduction(self.sections)

    @property
    def dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def checkpoint_dir(self) -> Path:
        return self.config.checkpoint_dir

    @property
    @abstractmethod
    def total_steps(self) -> int:
        """The step at which the run ends."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether nothing is left to train."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain values: what a checkpoint keeps beside weights and optimizer."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises ValueError where it is of other data."""

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
                self.total_steps,
                asdict(self.config),
                self.progress.step or None,
            )


def build_model(
    config: CommonConfig, compute: ComputeConfig
) -> tuple[TransformerConfig, list[nn.Module], MegatronOptimizer]:
    """The model chunks of this process and their optimizer, over Megatron's initialised groups."""
    # Losses of routers that nobody has read: those of a run before this one in the same process.
    clear_aux_losses_tracker()
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed, force_reset_rng=True)
    transformer = transformer_config(config.model, config.parallel, compute, compute.precision)
    chunks = wrap_for_training(
        build_chunks(config.model, transformer, seed=config.seed), transformer, config.optim
    )
    optimizer = build_optimizer(chunks, config.optim, compute.precision)
    connect_schedule(transformer, chunks)
    return transformer, chunks, optimizer


def connect_schedule(transformer: TransformerConfig, chunks: list[Any]) -> None:
    """Megatron's schedules find the gradient hooks in the model's configuration.

    They also look for `grad_scale_func`, which FP32 and BF16 do not need. The optimizer's own would
    tie model and optimizer to each other through C++, where no garbage collector sees it: process
    groups of an ended run would keep their threads.
    """
    if chunks[0].ddp_config.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in chunks]
        transformer.no_sync_func = hooks if len(hooks) > 1 else hooks[0]


def _reduction(sections: Sections) -> Callable[..., None]:
    """Megatron's end of a backward pass, as a section. Of the run it may know no more: model and
    optimizer would be tied to each other again."""

    def reduce(*args: Any, **kwargs: Any) -> None:
        with sections.within("reduce"):
            finalize_model_grads(*args, **kwargs)

    return reduce


def data_rank() -> tuple[int, int]:
    """This process's place among those that read different rows, and their number."""
    return (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
