"""How OpenAI-compatible servers are asked for a completion, and what they say of it.

vLLM and SGLang take token ids and tell the ids and log-probabilities of what they drew. The server
of ``transformers serve`` (5.23) takes text and tells text: its responses are encoded again, which
may give other tokens than were drawn, and have no log-probabilities.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.inference import draws
from megatron_m1.rl.rollout.engine import Request

SERVERS = ("vllm", "sglang", "transformers")
_SEEDS = 2**31


@dataclass(frozen=True)
class Completion:
    """What a server drew.

    Attributes:
        logprobs: NaN where the server does not tell them.
        stopped: it ended itself, by its stop token or a stop text.
        model: whose it is, in the server's words.
        encoded_otherwise: the server drew another number of tokens than these, which are those of
            its text.
    """

    tokens: list[int]
    logprobs: list[float]
    stopped: bool
    model: str
    encoded_otherwise: bool = False


def body(server: str, model: str, request: Request, tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON of a request to ``/v1/completions`` for what is still to be drawn."""
    sampling = request.sampling
    done = request.begun.tokens if request.begun else []
    tokens = [*request.prompt, *done]
    left = sampling.max_new_tokens - len(done)
    # A response that goes on must not repeat the draws of its beginning.
    stream = draws.stream(request.seed, request.prompt_id, request.index) + len(done)
    asked: dict[str, Any] = {"model": model, "max_tokens": left, "seed": stream % _SEEDS}
    if sampling.stop:
        asked["stop"] = list(sampling.stop)
    if server == "transformers":
        return asked | {
            "prompt": tokenizer.decode(tokens),
            "generation_config": json.dumps(_generation_config(request, left, tokenizer)),
        }
    return asked | {
        "prompt": tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "skip_special_tokens": False,
        **({"include_stop_str_in_output": True} if server == "vllm" else {"no_stop_trim": True}),
    }


def _generation_config(request: Request, left: int, tokenizer: Tokenizer) -> dict[str, Any]:
    sampling = request.sampling
    config: dict[str, Any] = {
        "max_new_tokens": left,
        "do_sample": sampling.temperature > 0,
        "eos_token_id": tokenizer.eod,
        "pad_token_id": tokenizer.eod,
    }
    if sampling.temperature > 0:
        config |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        config["top_k"] = sampling.top_k
    return config


def completion(
    server: str, answer: dict[str, Any], request: Request, tokenizer: Tokenizer
) -> Completion:
    """A server's answer.

    Raises:
        ValueError: it is not one.
    """
    try:
        choice = answer["choices"][0]
        stopped = choice["finish_reason"] == "stop"
        model = str(answer["model"])
        if server == "transformers":
            return _from_text(choice["text"], stopped, model, answer["usage"], request, tokenizer)
        return _from_ids(choice, stopped, model, tokenizer)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the answer has no {error}: {json.dumps(answer)[:200]}") from error


def _from_text(
    text: str,
    stopped: bool,
    model: str,
    usage: dict[str, Any],
    request: Request,
    tokenizer: Tokenizer,
) -> Completion:
    tokens = tokenizer.encode(text, parse_special=False)
    if stopped and not any(stop in text for stop in request.sampling.stop):
        tokens.append(tokenizer.eod)
    other = len(tokens) != usage["completion_tokens"]
    return Completion(tokens, [math.nan] * len(tokens), stopped, model, other)


def _from_ids(
    choice: dict[str, Any], stopped: bool, model: str, tokenizer: Tokenizer
) -> Completion:
    """Tokens are told as ``token_ids``, or as texts ``token_id:17`` with the log-probabilities."""
    told = choice.get("logprobs") or {}
    tokens = choice.get("token_ids")
    if tokens is None:
        texts = told.get("tokens")
        if not texts or not all(text.startswith("token_id:") for text in texts):
            raise KeyError("token_ids")
        tokens = [int(text.removeprefix("token_id:")) for text in texts]
    logprobs = told.get("token_logprobs") or [math.nan] * len(tokens)
    if len(logprobs) != len(tokens):
        raise KeyError("log-probability of each token")
    # Where the stop token itself is left out, it was drawn all the same.
    if stopped and choice.get("stop_reason") is None and tokens[-1:] != [tokenizer.eod]:
        tokens, logprobs = [*tokens, tokenizer.eod], [*logprobs, math.nan]
    return Completion(
        [int(token) for token in tokens],
        [math.nan if value is None else float(value) for value in logprobs],
        stopped,
        model,
    )
