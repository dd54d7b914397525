"""GPU-hours and dollars of a token budget, of some days of a cluster, and of an RL run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_m1.config import RunConfig
from megatron_m1.planning import flops
from megatron_m1.planning.config import Plan
from megatron_m1.planning.cost import StepCost
from megatron_m1.planning.rollout import Rollout, rollout

_HOUR, _DAY = 3600, 24 * 3600


@dataclass(frozen=True)
class Price:
    """What a run takes of the whole cluster."""

    gpu_hours: float
    days: float
    dollars: float | None

    @classmethod
    def of_seconds(cls, plan: Plan, seconds: float) -> Price:
        hours = plan.gpus * seconds / _HOUR
        rent = plan.dollars_per_gpu_hour
        return cls(hours, seconds / _DAY, None if rent is None else hours * rent)


def of_days(plan: Plan, days: float) -> Price:
    """Of the whole cluster for some days."""
    return Price.of_seconds(plan, days * _DAY)


def of_tokens(plan: Plan, cost: StepCost, tokens: int) -> Price:
    """Of training on ``tokens`` tokens, at the speed of the first batch."""
    return Price.of_seconds(plan, tokens / cost.tokens_per_second)


@dataclass(frozen=True)
class RlCost:
    """An RL run, in seconds of one round on the whole cluster.

    Attributes:
        generating: prefill of the prompts and decoding of the responses.
        scoring: a forward pass for the log-probabilities under the policy that generated.
        training: forward and backward over prompts and responses, in every epoch.
    """

    rollout: Rollout
    generating: float
    scoring: float
    training: float
    price: Price


def of_rl(config: RunConfig, plan: Plan, cost: StepCost) -> RlCost:
    """Of the run ``plan.rl``: generation and training take turns on all GPUs.

    Lengths are means, so the wait for the longest responses of a round is not counted; responses to
    one prompt share its prefill. Training goes at the speed of ``cost``, whose rows should be about
    as long as a prompt with its response.

    Raises:
        ConfigError: the cluster cannot hold the model to generate.
    """
    rl, model = plan.rl, config.model
    responses = rl.prompts * rl.responses
    length = rl.prompt_tokens + rl.response_tokens
    smallest = rollout(model, plan, 1, rl.prompt_tokens, rl.response_tokens)
    each = math.ceil(responses / (plan.gpus // smallest.gpus))
    decoding = rollout(model, plan, each, rl.prompt_tokens, rl.response_tokens)
    turns = math.ceil(each / decoding.batch)
    generating = turns * rl.response_tokens * decoding.step_seconds
    prompt = sum(flops.prefill(model, rl.prompt_tokens).values()) if rl.prompt_tokens else 0.0
    peak = plan.gpus * plan.bf16_tflops * 1e12 * plan.efficiency.matmul
    generating += rl.prompts * prompt / peak
    once = responses * length / cost.tokens_per_second
    scoring, training = once / 3, rl.epochs * once
    seconds = rl.steps * (generating + scoring + training)
    return RlCost(decoding, generating, scoring, training, Price.of_seconds(plan, seconds))
