"""Small parts around the training loop, one a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_m1.observe.sinks import Metrics

if TYPE_CHECKING:
    from megatron_m1.training.run import Run


class Callback:
    """What happens beside the steps. Every process calls every callback, so they may communicate."""

    def on_step(self, run: Run, metrics: Metrics) -> None:
        """After a step, before its record is written; may add to ``metrics``."""

    def on_end(self, run: Run) -> None:
        """After the last step."""


def default_callbacks(run: Run) -> list[Callback]:
    """The callbacks that a run's configuration asks for, in the order they are called."""
    from megatron_m1.training.callbacks.checkpointer import Checkpointer
    from megatron_m1.training.callbacks.evaluator import Evaluator
    from megatron_m1.training.callbacks.reporter import Reporter
    from megatron_m1.training.callbacks.sampler import Sampler

    config = run.config
    found: list[Callback] = []
    if config.train.eval_every and run.corpus.valid:
        found.append(Evaluator(config.train.eval_every, config.train.eval_rows))
    found.append(Checkpointer(config.checkpoint.every, config.checkpoint.save_at_end))
    if config.train.sample_prompt and run.tokenizer:
        found.append(Sampler(config.train.sample_prompt, config.train.sample_tokens))
    if config.train.report:
        found.append(Reporter())
    return found
