"""The callbacks of a run of RL."""

from __future__ import annotations

import torch.distributed as dist

from megatron_m1.checkpoint.folders import step_of
from megatron_m1.observe.sinks import Metrics
from megatron_m1.rl import journal
from megatron_m1.rl.state import RLRun, rollouts_folder
from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.callbacks.checkpointer import Checkpointer
from megatron_m1.training.callbacks.reporter import Reporter


class Forgetter(Callback[RLRun]):
    """Removes the responses of steps that every checkpoint is past."""

    def on_step(self, run: RLRun, metrics: Metrics) -> None:
        if dist.get_rank() != 0:
            return
        kept = [step_of(path) for path in run.checkpoint_dir.glob("step_*")]
        whole = [step for step in kept if step >= 0]
        if whole:
            journal.forget(rollouts_folder(run.config), before=min(whole) + 1)


def default_callbacks(run: RLRun) -> list[Callback[RLRun]]:
    """The callbacks that a run's configuration asks for, in the order they are called."""
    found: list[Callback[RLRun]] = [Checkpointer(run.config.checkpoint), Forgetter()]
    if run.config.train.report:
        found.append(Reporter())
    return found
