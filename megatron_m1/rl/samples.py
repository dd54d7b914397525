"""What travels through the loop of RL: a prompt, a response to it, a response with its reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Why a response ended. "paused" is a partial rollout, which a later rollout goes on with.
FINISHES = ("stop", "length", "repetition", "paused")


@dataclass(frozen=True)
class Prompt:
    """A question for the policy and what its verifier needs to judge an answer."""

    id: int  # position in the stream of prompts: unique, and stable over a resume
    data_source: str  # picks the verifier, verl's word
    text: str  # what the policy reads, chat template already applied
    ground_truth: Any
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass
class Response:
    """What the rollout policy drew for one member of a prompt's group."""

    prompt_id: int
    index: int  # 0..G-1 within its group
    tokens: list[int]  # without the prompt; with the stop token if one was drawn
    logprobs: list[float]  # of the distribution sampled from (temperature, top-p, top-k applied)
    raw_logprobs: list[float]  # of the model's own at temperature 1: what the trainer recomputes
    versions: list[int]  # policy version that drew each token (non-decreasing)
    finish: str  # one of FINISHES
    experts: Tensor | None = None  # [prompt + response - 1, MoE layers, topk] int16, for replay


@dataclass
class Scored:
    """A response with its reward."""

    response: Response
    reward: float
    details: dict[str, float] = field(default_factory=dict)  # what the verifier reported beside
    failed: bool = False  # the verifier raised or timed out: masked and counted, never a silent 0
