"""Requests and answers of ``/v1/completions`` as plain values: OpenAI's fields, those of vLLM for
token ids, and ``prompt_id``, ``index`` and ``begun``, by which draws are those of our own rollout.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from typing import Any

from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.inference.requests import Continuation, SamplingParams, Sequence

REQUIRED = object()
_NUMBER = (int, float)

# Type and default of each field that is heeded.
_FIELDS: dict[str, tuple[tuple[type, ...], Any]] = {
    "prompt": ((str, list), REQUIRED),
    "model": ((str,), None),
    "max_tokens": ((int,), 16),
    "temperature": (_NUMBER, 1.0),
    "top_p": (_NUMBER, 1.0),
    "top_k": ((int,), 0),
    "seed": ((int,), 0),
    "stop": ((str, list), []),
    "logprobs": ((int,), None),
    "repetition_length": ((int,), 0),
    "repetition_probability": (_NUMBER, 0.99),
    "prompt_id": ((int,), 0),
    "index": ((int,), 0),
    "begun": ((int,), 0),
    "stop_token_ids": ((list,), None),
    "return_token_ids": ((bool,), False),
    "return_tokens_as_token_ids": ((bool,), False),
    "skip_special_tokens": ((bool,), True),
    "include_stop_str_in_output": ((bool,), False),
    "user": ((str,), None),
}
# What these may be, since nothing else is done.
_FIXED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
# Below it logits may leave the range of float32.
_COLDEST = 1e-4


class BadRequest(Exception):
    """A request that cannot be answered; one sentence: what, which value, what would be right."""


@dataclass(frozen=True)
class Limits:
    """What a server can take.

    Attributes:
        places: tokens of prompt and response.
    """

    tokenizer: Tokenizer
    vocabulary: int
    places: int


@dataclass(frozen=True)
class Weights:
    """Whose answers a server gives: a name and a version for people and clients to compare."""

    name: str
    version: int


@dataclass(frozen=True)
class Asked:
    """A request that can be answered.

    Attributes:
        model: the name of the weights that are wanted; None takes what there is.
        fields: all that are heeded.
    """

    model: str | None
    sequence: Sequence
    fields: dict[str, Any]


def parsed(content: bytes) -> dict[str, Any]:
    """
    Raises:
        BadRequest: it is no JSON object.
    """
    try:
        found = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the request is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadRequest(f"the request is {type(found).__name__}, not a JSON object")
    return found


def read(body: dict[str, Any], limits: Limits) -> Asked:
    """
    Raises:
        BadRequest: a field that is unknown, or a value that cannot be.
    """
    fields = _fields(body)
    tokens = _tokens(fields["prompt"], limits)
    begun, left = fields["begun"], fields["max_tokens"]
    if not 0 <= begun < len(tokens):
        raise BadRequest(f"begun={begun} must be at least 0 and leave a token of the prompt")
    if left < 1 or len(tokens) + left > limits.places:
        raise BadRequest(
            f"max_tokens={left} after {len(tokens)} tokens of prompt must be at least 1, and both "
            f"within server.max_length={limits.places}"
        )
    if fields["stop_token_ids"] not in (None, [], [limits.tokenizer.eod]):
        raise BadRequest(
            f"stop_token_ids={fields['stop_token_ids']} is not [{limits.tokenizer.eod}], the end "
            "of a document in the server's tokenizer"
        )
    if fields["logprobs"] not in (None, 0, 1):
        raise BadRequest(f"logprobs={fields['logprobs']}: of drawn tokens alone, use 0 or 1")
    split = len(tokens) - begun
    sequence = Sequence(
        tokens[:split],
        _sampling(fields, begun, limits),
        fields["seed"],
        fields["prompt_id"],
        fields["index"],
        _begun(tokens[split:]) if begun else None,
    )
    return Asked(fields["model"], sequence, fields)


def _fields(body: dict[str, Any]) -> dict[str, Any]:
    unknown = [name for name in body if name not in _FIELDS and name not in _FIXED]
    if unknown:
        raise BadRequest(f"{unknown[0]} is not a field that this server knows")
    for name, allowed in _FIXED.items():
        if body.get(name) is not None and body[name] not in allowed:
            raise BadRequest(f"{name}={body[name]} is not offered: leave it out")
    fields = {}
    for name, (types, default) in _FIELDS.items():
        value = body.get(name)
        if value is None:
            if default is REQUIRED:
                raise BadRequest(f"{name} is missing")
            value = default
        elif not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(kind.__name__ for kind in types)
            raise BadRequest(f"{name}={str(value)[:60]} is {type(value).__name__}, not {wanted}")
        fields[name] = value
    return fields


def _tokens(prompt: str | list[Any], limits: Limits) -> tuple[int, ...]:
    if isinstance(prompt, str):
        # A model that has seen only whole documents starts an empty prompt where one starts.
        return tuple(limits.tokenizer.encode(prompt)) or (limits.tokenizer.eod,)
    if not prompt or any(type(token) is not int for token in prompt):
        raise BadRequest("prompt must be a text or a list of token ids, one at least")
    if min(prompt) < 0 or max(prompt) >= limits.vocabulary:
        raise BadRequest(f"prompt has ids outside the vocabulary 0..{limits.vocabulary - 1}")
    return tuple(prompt)


def _sampling(fields: dict[str, Any], begun: int, limits: Limits) -> SamplingParams:
    stop = [fields["stop"]] if isinstance(fields["stop"], str) else fields["stop"]
    if any(not isinstance(text, str) for text in stop):
        raise BadRequest(f"stop={str(stop)[:60]} must be a text or a list of texts")
    if 0 < fields["temperature"] < _COLDEST:
        raise BadRequest(f"temperature={fields['temperature']} must be 0 or at least {_COLDEST}")
    sampling = SamplingParams(
        temperature=float(min(fields["temperature"], 1e9)),
        top_p=float(fields["top_p"]),
        # vLLM's -1 is our 0; no more than all.
        top_k=0 if fields["top_k"] == -1 else min(fields["top_k"], limits.vocabulary),
        max_new_tokens=begun + fields["max_tokens"],
        stop=tuple(stop),
        repetition_length=min(fields["repetition_length"], limits.places),
        repetition_probability=float(fields["repetition_probability"]),
    )
    problems = sampling.problems("request")
    if problems:
        raise BadRequest(problems[0])
    return sampling


def _begun(tokens: tuple[int, ...]) -> Continuation:
    """A response of which only the tokens are known: none counts as sure."""
    known = len(tokens)
    never = [-math.inf] * known
    return Continuation(list(tokens), never, never, [0] * known)


def answer(
    number: int, asked: Asked, found: Continuation, weights: Weights, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The JSON of a completion."""
    fields, begun = asked.fields, asked.fields["begun"]
    tokens = found.tokens[begun:]
    text = tokenizer.decode(tokens, skip_special=fields["skip_special_tokens"])
    stop = _stop_text(asked, found, tokenizer)
    if stop and not fields["include_stop_str_in_output"]:
        text = text[: text.rfind(stop)] if stop in text else text
    choice: dict[str, Any] = {
        "index": 0,
        "text": text,
        "finish_reason": found.finish,
        "stop_reason": stop,
        "logprobs": None if fields["logprobs"] is None else _logprobs(asked, found, tokenizer),
    }
    if fields["return_token_ids"]:
        choice["token_ids"] = tokens
    return {
        "id": f"cmpl-{number}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": weights.name,
        "weight_version": weights.version,
        "choices": [choice],
        "usage": {
            "prompt_tokens": len(asked.sequence.tokens),
            "completion_tokens": len(tokens),
            "total_tokens": len(asked.sequence.prompt) + len(found.tokens),
        },
    }


def _stop_text(asked: Asked, found: Continuation, tokenizer: Tokenizer) -> str | None:
    """Which stop text ended it; None for the stop token."""
    if found.finish != "stop":
        return None
    text = tokenizer.decode(found.tokens)
    return next((stop for stop in asked.sequence.sampling.stop if stop in text), None)


def _logprobs(asked: Asked, found: Continuation, tokenizer: Tokenizer) -> dict[str, Listed[Any]]:
    """Of the distribution that was drawn from, as in OpenAI's, and of the model at temperature
    1."""
    new = slice(asked.fields["begun"], None)
    by_id = asked.fields["return_tokens_as_token_ids"]
    return {
        "tokens": [
            f"token_id:{token}" if by_id else tokenizer.decode([token])
            for token in found.tokens[new]
        ],
        "token_logprobs": found.logprobs[new],
        "raw_token_logprobs": found.raw_logprobs[new],
    }


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a number")
