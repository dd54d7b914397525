"""The callbacks of a run, from its configuration."""

from __future__ import annotations

from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.callbacks.checkpointer import Checkpointer
from megatron_m1.training.callbacks.evaluator import Evaluator
from megatron_m1.training.callbacks.injector import Injector
from megatron_m1.training.callbacks.reporter import Reporter
from megatron_m1.training.callbacks.rollback import Rollback
from megatron_m1.training.callbacks.sampler import Sampler
from megatron_m1.training.callbacks.stragglers import Stragglers
from megatron_m1.training.run import Run


def default_callbacks(run: Run) -> list[Callback[Run]]:
    """The callbacks that a run's configuration asks for, in the order they are called."""
    config = run.config
    found: list[Callback[Run]] = [Injector(config.fault)] if config.fault else []
    if config.train.straggler_every:
        train = config.train
        found.append(Stragglers(train.straggler_every, train.straggler_factor))
    if config.train.eval_every and run.corpus.valid:
        found.append(Evaluator(config.train.eval_every, config.train.eval_rows))
    checkpointer = Checkpointer(config.checkpoint)
    found.append(checkpointer)
    if config.train.spike.deviations:
        found.append(Rollback(config.train.spike, checkpointer))
    if config.train.sample_prompt and run.tokenizer:
        found.append(Sampler(config.train.sample_prompt, config.train.sample_tokens))
    if config.train.report:
        found.append(Reporter())
    return found
