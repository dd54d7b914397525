"""An engine over scripted servers, and answers for it."""

from __future__ import annotations

from typing import Any

from megatron_m1.data.tokenizer import train_bpe
from megatron_m1.rl.rollout.config import HttpConfig
from megatron_m1.rl.rollout.engine import Request, SamplingParams
from megatron_m1.rl.rollout.http import HttpEngine
from megatron_m1.rl.rollout.servers import Published
from megatron_m1.rl.samples import Response
from tests.rl.rollout.scripted import Script, server

TOKENIZER = train_bpe(["abc"], 260)
EOD = TOKENIZER.eod
SAMPLING = SamplingParams(max_new_tokens=5)
REQUEST = Request(3, 1, (10, 11), 7, SAMPLING)


def answer(model: str, tokens: list[int], finish: str = "length", **choice: Any) -> dict[str, Any]:
    """As vLLM gives it, with what our own server and SGLang add."""
    logprobs: dict[str, Any] = {"tokens": [f"token_id:{token}" for token in tokens]}
    logprobs["token_logprobs"] = [-0.5 - token / 100 for token in tokens]
    logprobs["raw_token_logprobs"] = [-1.5 - token / 100 for token in tokens]
    choice = {"finish_reason": finish, "logprobs": logprobs, "stop_reason": None} | choice
    return {
        "model": model,
        "metadata": {"weight_version": model},
        "choices": [choice],
        "usage": {"completion_tokens": len(tokens)},
    }


def published(version: int) -> Published:
    return Published(f"folder-{version}", f"policy-{version}", version)


def engine(*urls: str, **options: Any) -> HttpEngine:
    given = HttpConfig(
        **{"urls": [*urls], "timeout": 5.0, "backoff": 0.01, "attempts": 3} | options
    )
    assert not given.problems()
    return HttpEngine(given, TOKENIZER, published)


def drawn(script: Script, *requests: Request, **options: Any) -> tuple[list[Response], HttpEngine]:
    with server(script) as served:
        asking = engine(served.url, **options)
        return list(asking.generate(requests or [REQUEST])), asking
