"""A pretraining run and its parts: what the loop and the steps work on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megatron.core.rerun_state_machine import RerunStateMachine

from megatron_m1.config import RunConfig
from megatron_m1.data.reader import Reader
from megatron_m1.data.sources import Corpus, open_corpus
from megatron_m1.training import phases
from megatron_m1.training.rerun import rerun_machine
from megatron_m1.training.state import Progress, Training, build_model


@dataclass
class Run(Training):
    """Everything that pretraining holds."""

    config: RunConfig
    corpus: Corpus
    total_tokens: int
    rerun: RerunStateMachine = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rerun = rerun_machine(self.config.train.rerun)

    @property
    def reader(self) -> Reader:
        return self.corpus.train

    @property
    def total_steps(self) -> int:
        return phases.total_steps(self.config.train)

    @property
    def finished(self) -> bool:
        steps = self.config.train.steps
        if steps is not None:
            return self.progress.step >= steps
        return self.progress.tokens >= self.total_tokens

    def state_dict(self) -> dict[str, Any]:
        return {"progress": asdict(self.progress), "reader": self.reader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        self.reader.load_state_dict(state["reader"])


def build_run(config: RunConfig) -> Run:
    """Model, optimizer and data of a run, over Megatron's initialised groups."""
    model = build_model(config, config.train)
    corpus = open_corpus(config.data, config.model.vocab_size, config.train, config.seed)
    tokens = phases.total_tokens(config.train)
    return Run(config, *model, corpus, tokens, tokenizer=corpus.tokenizer)
