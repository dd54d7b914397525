"""What is recorded of a step of RL. Names are verl's where they mean the same."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch.distributed as dist

from megatron_m1.observe.sinks import Metrics
from megatron_m1.rl.collecting import Batch
from megatron_m1.rl.groups import Group
from megatron_m1.rl.learning import Learned
from megatron_m1.rl.rewards.registry import Registry
from megatron_m1.rl.rewards.scorer import reward_metrics
from megatron_m1.rl.rollout.engine import Engine
from megatron_m1.rl.rollout.http import HttpEngine
from megatron_m1.rl.samples import Prompt, Scored
from megatron_m1.rl.state import RLRun
from megatron_m1.training.metrics import expert_load, peak_memory

GENERATIVE = ("grade", "compare")
"""Verifiers that are models."""


@dataclass(frozen=True)
class Times:
    """When a step began, had its batch, had trained on it, and had given its weights to the engine,
    in seconds."""

    started: float
    collected: float
    trained: float
    ended: float = field(default_factory=time.perf_counter)


def step_metrics(run: RLRun, batch: Batch, learned: Learned, times: Times) -> Metrics:
    """The record of one step, the same on every process but for times and memory."""
    seconds = times.ended - times.started
    return {
        "train/step": run.progress.step,
        "train/updates": run.updates,
        "train/tokens": run.progress.tokens,
        "train/prompts": batch.next_prompt,
        "optim/lr": learned.learning_rate,
        **learned.metrics,
        **_rewards(batch.judged),
        **_length_bias(run, batch.judged),
        **_advantages(learned.advantages),
        **response_lengths(batch.judged, batch.window),
        **staleness(batch.groups, run.progress.step - 1),
        **_servers(run.engine),
        "rollout/groups": len(batch.groups),
        "rollout/groups_without_spread": batch.without_spread,
        "rollout/paused": batch.paused,
        "rollout/window": batch.window,
        "rollout/tokens": batch.drawn,
        "timing_s/gen": batch.rollout_seconds,
        "timing_s/reward": batch.reward_seconds,
        "timing_s/wait_for_rollout": times.collected - times.started,
        "timing_s/wait_for_weights": batch.held_seconds,
        "timing_s/old_log_prob": learned.old_seconds,
        "timing_s/update_actor": learned.update_seconds,
        "timing_s/update_weights": times.ended - times.trained,
        "timing_s/step": seconds,
        "perf/throughput": (batch.drawn + learned.positions) / seconds / dist.get_world_size(),
        "perf/peak_mem_gib": peak_memory() / 2**30,
        **expert_load(run),
    }


def _rewards(judged: Sequence[tuple[Prompt, Scored]]) -> Metrics:
    """Of every response that a verifier could judge, those that dynamic sampling leaves out too."""
    rewards = [one.reward for _, one in judged if not one.failed]
    sources = [prompt.data_source for prompt, _ in judged]
    metrics: Metrics = {**reward_metrics(sources, [one for _, one in judged])}
    if rewards:
        metrics["critic/rewards/mean"] = float(np.mean(rewards))
        metrics["critic/rewards/max"] = max(rewards)
        metrics["critic/rewards/min"] = min(rewards)
    return metrics


def _length_bias(run: RLRun, judged: Sequence[tuple[Prompt, Scored]]) -> Metrics:
    """Of the responses that a generative model judged; the others say whether the task gains."""
    registry = Registry(run.config.reward)
    found = [(prompt, one) for prompt, one in judged if not one.failed]
    by_model = [registry.verifier(prompt.data_source).use in GENERATIVE for prompt, _ in found]
    if not any(by_model):
        return {}
    ours = [pair for pair, is_model in zip(found, by_model, strict=True) if is_model]
    others = [
        one.reward for (_, one), is_model in zip(found, by_model, strict=True) if not is_model
    ]
    return {
        **run.length_bias.observe(
            [one.reward for _, one in ours],
            [len(one.response.tokens) for _, one in ours],
            [prompt.id for prompt, _ in ours],
            float(np.mean(others or [0.0])),
        )
    }


def _advantages(advantages: Sequence[float]) -> Metrics:
    if not advantages:
        return {}
    return {
        "critic/advantages/mean": float(np.mean(advantages)),
        "critic/advantages/max": max(advantages),
        "critic/advantages/min": min(advantages),
    }


def staleness(groups: Sequence[Group], version: int) -> Metrics:
    """How many policy versions the oldest token of a response is behind those that train on it."""
    ages = [
        version - min(response.versions)
        for group in groups
        for response in group.in_order
        if response.versions
    ]
    if not ages:
        return {}
    return {
        "training/off_policy/trajectory_staleness/mean": float(np.mean(ages)),
        "training/off_policy/trajectory_staleness/max": max(ages),
    }


def _servers(engine: Engine) -> Metrics:
    """What went wrong with servers; of the first process, which alone asks them."""
    if not isinstance(engine, HttpEngine):
        return {}
    counts = engine.counts.taken()
    return {
        "rollout/retries": counts.get("retries", 0),
        "rollout/stale_answers": counts.get("stale", 0),
        "rollout/encoded_otherwise": counts.get("encoded_otherwise", 0),
    }


def response_lengths(judged: Sequence[tuple[Prompt, Scored]], window: int) -> Metrics:
    """Lengths in tokens, why responses ended, and how sure the policy was of them."""
    if not judged:
        return {}
    responses = [one.response for _, one in judged]
    lengths = [len(response.tokens) for response in responses]
    repeating = [len(r.tokens) for r in responses if r.finish == "repetition"]
    told = [value for response in responses for value in response.raw_logprobs]
    raw = [value for value in told if not math.isnan(value)]
    metrics: Metrics = {
        "response_length/mean": float(np.mean(lengths)),
        "response_length/max": max(lengths),
        "response_length/p99": float(np.percentile(lengths, 99)),
        "response_length/clip_ratio": sum(r.finish == "length" for r in responses) / len(judged),
        "rollout/repetition_ratio": len(repeating) / len(judged),
        "rollout/repetition_tokens_saved": sum(window - length for length in repeating),
    }
    if raw:
        metrics["rollout/perplexity"] = math.exp(min(-sum(raw) / len(raw), 700))
    return metrics
