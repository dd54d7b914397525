"""How each kind of OpenAI-compatible server is asked for a completion and told to load weights, and
what it says.

Our own server, vLLM and SGLang take token ids and tell the ids and log-probabilities of what they
drew. The server of ``transformers serve`` (5.23) takes text and tells text: its responses are
encoded again, which may give other tokens than were drawn, and have no log-probabilities.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.inference import draws
from megatron_m1.rl.rollout.config import HttpConfig
from megatron_m1.rl.rollout.engine import Request

FORMATS = {
    "megatron_m1": None,
    "vllm": "minimax_m1",
    "sglang": "minimax_m1",
    "transformers": "transformers",
}
"""What each server loads: a format of ``conversion.families``, or our own checkpoints."""

ENDS = ("stop", "length", "repetition")
"""Why a response that has ended did."""

_SEEDS = 2**31


@dataclass(frozen=True)
class Published:
    """Weights in a folder.

    Attributes:
        name: that no other weights have, of whatever run.
    """

    folder: str
    name: str
    version: int


@dataclass(frozen=True)
class Completion:
    """What a server drew.

    Attributes:
        raw, sampled: log-probabilities under the model at temperature 1 and in the distribution
            that was drawn from; NaN where the server does not tell them.
        finish: one of ``ENDS``, stop being a stop token or text; or why the server gave it up.
        weights: whose it is, in the server's words.
        encoded_otherwise: the server drew another number of tokens than these, which are those of
            its text.
    """

    tokens: list[int]
    raw: list[float]
    sampled: list[float]
    finish: str
    weights: str
    encoded_otherwise: bool = False


def loading(server: str, weights: Published) -> tuple[str, dict[str, Any]] | None:
    """The path and JSON by which a server is told to load weights; None of one that loads them when
    it is asked for them."""
    return {
        "megatron_m1": ("/load_weights", vars(weights)),
        "vllm": (
            "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": weights.folder}},
        ),
        "sglang": (
            "/update_weights_from_disk",
            {"model_path": weights.folder, "weight_version": weights.name},
        ),
        "transformers": None,
    }[server]


def model_name(config: HttpConfig, weights: Published) -> str:
    """What a request calls the model."""
    if config.server == "transformers":
        return weights.folder
    return weights.name if config.server == "megatron_m1" else config.model or ""


def tag(config: HttpConfig, weights: Published) -> str:
    """What an answer says that was drawn with these weights. vLLM says the name that it serves the
    model under, whatever the weights."""
    return weights.name if config.server == "sglang" else model_name(config, weights)


def body(
    config: HttpConfig, weights: Published, request: Request, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The JSON of a request to ``/v1/completions`` for what is still to be drawn."""
    server, sampling = config.server, request.sampling
    done = request.begun.tokens if request.begun else []
    tokens = [*request.prompt, *done]
    left = sampling.max_new_tokens - len(done)
    asked: dict[str, Any] = {"model": model_name(config, weights), "max_tokens": left}
    if sampling.stop:
        asked["stop"] = list(sampling.stop)
    if server == "megatron_m1":
        seeding = _own_fields(request, len(done), tokenizer)
    else:
        # A response that goes on must not repeat the draws of its beginning.
        stream = draws.stream(request.seed, request.prompt_id, request.index) + len(done)
        seeding = {"seed": stream % _SEEDS}
    if server == "transformers":
        return asked | {
            **seeding,
            "prompt": tokenizer.decode(tokens),
            "generation_config": json.dumps(_generation_config(request, left, tokenizer)),
        }
    return asked | {
        **seeding,
        "prompt": tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "skip_special_tokens": False,
        **({"no_stop_trim": True} if server == "sglang" else {"include_stop_str_in_output": True}),
        # What vLLM keeps of prompts outlives the weights that read them.
        **({"cache_salt": weights.name} if server == "vllm" else {}),
    }


def _own_fields(request: Request, done: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """What our own server takes beyond OpenAI's fields, so that it draws what the native engine
    would."""
    sampling = request.sampling
    fields: dict[str, Any] = {
        "seed": request.seed,
        "prompt_id": request.prompt_id,
        "index": request.index,
        "begun": done,
        "stop_token_ids": [tokenizer.eod],
    }
    if sampling.repetition_length:
        fields["repetition_length"] = sampling.repetition_length
        fields["repetition_probability"] = sampling.repetition_probability
    return fields


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
    config: HttpConfig, answer: dict[str, Any], request: Request, tokenizer: Tokenizer
) -> Completion:
    """A server's answer.

    Raises:
        ValueError: it is not one.
    """
    try:
        choice = answer["choices"][0]
        if config.server == "transformers":
            return _from_text(choice, answer, request, tokenizer)
        return _from_ids(config, choice, answer, request, tokenizer)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the answer has no {error}: {json.dumps(answer)[:200]}") from error


def _from_text(
    choice: dict[str, Any], answer: dict[str, Any], request: Request, tokenizer: Tokenizer
) -> Completion:
    text, finish = choice["text"], choice["finish_reason"]
    tokens = tokenizer.encode(text, parse_special=False)
    ended_itself = finish == "stop" and not any(stop in text for stop in request.sampling.stop)
    if ended_itself or not tokens:
        tokens.append(tokenizer.eod)
    other = len(tokens) != answer["usage"]["completion_tokens"]
    left = request.sampling.max_new_tokens - len(request.begun.tokens if request.begun else [])
    if len(tokens) > left:
        tokens, finish = tokens[:left], "length"
    unknown = [math.nan] * len(tokens)
    # It adds the revision, after an @.
    weights = str(answer["model"]).rpartition("@")[0] or str(answer["model"])
    return Completion(tokens, unknown, unknown, finish, weights, other)


def _from_ids(
    config: HttpConfig,
    choice: dict[str, Any],
    answer: dict[str, Any],
    request: Request,
    tokenizer: Tokenizer,
) -> Completion:
    """Tokens are told as ``token_ids``, or as texts ``token_id:17`` with the log-probabilities."""
    logprobs, finish = choice.get("logprobs") or {}, choice["finish_reason"]
    tokens = choice.get("token_ids")
    if tokens is None:
        texts = logprobs.get("tokens")
        if not texts or not all(text.startswith("token_id:") for text in texts):
            raise KeyError("token_ids")
        tokens = [int(text.removeprefix("token_id:")) for text in texts]
    told = _numbers(logprobs.get("token_logprobs"), len(tokens))
    if config.server == "megatron_m1":
        raw, sampled = _numbers(logprobs.get("raw_token_logprobs"), len(tokens)), told
    else:
        raw, sampled = _both(told, config.logprobs_are, request)
    tokens = [int(token) for token in tokens]
    # Where the stop token itself is left out, it was drawn all the same.
    by_text = choice.get("stop_reason") is not None or isinstance(choice.get("matched_stop"), str)
    if finish == "stop" and not by_text and tokens[-1:] != [tokenizer.eod]:
        tokens, raw, sampled = [*tokens, tokenizer.eod], [*raw, math.nan], [*sampled, math.nan]
    weights = answer["metadata"]["weight_version"] if config.server == "sglang" else answer["model"]
    return Completion(tokens, raw, sampled, finish, str(weights))


def _numbers(told: list[float | None] | None, count: int) -> list[float]:
    """NaN where nothing is told."""
    if not told:
        return [math.nan] * count
    if len(told) != count:
        raise KeyError("log-probability of each token")
    return [math.nan if value is None else float(value) for value in told]


def _both(told: list[float], kind: str, request: Request) -> tuple[list[float], list[float]]:
    """Raw log-probabilities and those of the distribution sampled from, of which a server tells
    one."""
    sampling = request.sampling
    if (sampling.temperature, sampling.top_p, sampling.top_k) == (1, 1, 0):
        return told, told
    unknown = [math.nan] * len(told)
    return (told, unknown) if kind == "raw" else (unknown, told)
