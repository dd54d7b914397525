"""From a configuration to a run of RL, over Megatron's initialised groups."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import nn

from megatron_m1.checkpoint import agreement
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.prompts import Prompts
from megatron_m1.rl.recording import Judge
from megatron_m1.rl.rewards.length_bias import LengthBias
from megatron_m1.rl.rewards.scorer import Scorer
from megatron_m1.rl.rollout.engine import Engine
from megatron_m1.rl.rollout.http import HttpEngine
from megatron_m1.rl.rollout.native import NativeEngine
from megatron_m1.rl.rollout.publishing import Publisher
from megatron_m1.rl.samples import Prompt, Response, Scored
from megatron_m1.rl.sources import open_prompts, open_tokenizer
from megatron_m1.rl.state import RLRun, collecting
from megatron_m1.rl.windows import Windows
from megatron_m1.training.state import build_model


@contextmanager
def rl_run(config: RLConfig) -> Iterator[RLRun]:
    """Model, optimizer, engine, prompts and, until the block ends, verifiers of a run."""
    tokenizer = open_tokenizer(config)
    prompts = open_prompts(config, config.seed)
    transformer, chunks, optimizer = build_model(config, config.train)
    engine = build_engine(config, chunks, tokenizer)
    with (
        _judge(config, tokenizer, prompts) as judge,
        collecting(config, prompts, tokenizer, engine, judge) as collector,
    ):
        yield RLRun(
            config,
            transformer,
            chunks,
            optimizer,
            engine,
            collector,
            Windows(config.rl.windows, config.rollout.max_new_tokens),
            tokenizer=tokenizer,
            length_bias=LengthBias(config.reward.generative.length_bias),
        )


def build_engine(config: RLConfig, chunks: list[nn.Module], tokenizer: Tokenizer) -> Engine:
    rollout = config.rollout
    if rollout.engine == "http":
        folder = Path(rollout.http.folder or Path(config.run_dir) / "weights")
        publish = Publisher(rollout.http, folder, chunks, config.model, tokenizer)
        return HttpEngine(rollout.http, tokenizer, publish)
    return NativeEngine(
        chunks,
        tokenizer,
        slots=rollout.slots,
        prefill_tokens=rollout.prefill_tokens,
        record_experts=config.rl.routing_replay,
    )


@contextmanager
def _judge(config: RLConfig, tokenizer: Tokenizer, prompts: Prompts) -> Iterator[Judge]:
    """The verifiers of all data sources, which the first process has.

    Raises:
        UserError: on every process, a data source has none, or it cannot run here.
    """
    with ExitStack() as stack:

        def opened() -> Judge:
            if dist.get_rank() != 0:
                return _nobody
            scorer = stack.enter_context(
                Scorer(config.reward, lambda tokens: tokenizer.decode(tokens, skip_special=True))
            )
            scorer.prepare(sorted(prompts.data_sources))
            return scorer.submit

        yield agreement.everywhere(opened)


def _nobody(prompt: Prompt, response: Response) -> Future[Scored]:
    raise AssertionError("the first process judges")
