"""What may be asked for, and how it is answered."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from megatron_m1.inference.requests import Continuation, SamplingParams, Sequence
from megatron_m1.serving.protocol import BadRequest, Limits, Weights, answer, parsed, read
from tests.serving.served import TOKENIZER

EOD = TOKENIZER.eod
LIMITS = Limits(TOKENIZER, 300, 20)
WEIGHTS = Weights("w", 4)


def test_only_a_prompt_is_needed() -> None:
    asked = read({"prompt": [5, 6]}, LIMITS)
    assert asked.sequence == Sequence((5, 6), SamplingParams(max_new_tokens=16))
    assert asked.model is None
    assert read({"prompt": "the"}, LIMITS).sequence.prompt == tuple(TOKENIZER.encode("the"))
    assert read({"prompt": ""}, LIMITS).sequence.prompt == (EOD,)


def test_every_field_has_its_place() -> None:
    asked = read(
        {
            "model": "w",
            "prompt": [5, 6, 7],
            "max_tokens": 4,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 8,
            "seed": -3,
            "stop": "x",
            "repetition_length": 3,
            "repetition_probability": 0.5,
            "prompt_id": 9,
            "index": 2,
            "begun": 1,
            "stop_token_ids": [EOD],
        },
        LIMITS,
    )
    sampling = SamplingParams(0.5, 0.9, 8, 5, ("x",), 3, 0.5)
    begun = Continuation([7], [-math.inf], [-math.inf], [0])
    assert asked.sequence == Sequence((5, 6), sampling, -3, 9, 2, begun)


@pytest.mark.parametrize("top_k", [-1, 0, 10**30])
def test_a_top_k_of_all_is_none(top_k: int) -> None:
    assert read({"prompt": [5], "top_k": top_k}, LIMITS).sequence.sampling.top_k in (0, 300)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt is missing"),
        ({"promt": [1]}, "promt is not a field"),
        ({"prompt": []}, "prompt must be a text or a list of token ids"),
        ({"prompt": [1.0]}, "prompt must be a text or a list of token ids"),
        ({"prompt": [True]}, "prompt must be a text or a list of token ids"),
        ({"prompt": [300]}, r"prompt has ids outside the vocabulary 0\.\.299"),
        ({"prompt": [-1]}, r"prompt has ids outside the vocabulary 0\.\.299"),
        ({"prompt": 7}, "prompt=7 is int, not str or list"),
        ({"max_tokens": 0}, "max_tokens=0 after 1 tokens of prompt must be at least 1"),
        ({"max_tokens": 20}, "max_tokens=20 after 1 .* within server.max_length=20"),
        ({"max_tokens": True}, "max_tokens=True is bool, not int"),
        ({"temperature": "1"}, "temperature=1 is str, not int or float"),
        ({"temperature": -1}, "request.temperature=-1.0 must not be negative"),
        ({"temperature": 1e-30}, "temperature=1e-30 must be 0 or at least 0.0001"),
        ({"top_p": 0}, "request.top_p=0.0 must be above 0"),
        ({"top_k": -2}, "request.top_k=-2 must not be negative"),
        ({"stop": [1]}, r"stop=\[1\] must be a text or a list of texts"),
        ({"stop": ""}, "request.stop=.* holds an empty text"),
        ({"begun": 1}, "begun=1 must be at least 0 and leave a token"),
        ({"stop_token_ids": [7]}, r"stop_token_ids=\[7\] is not \[0\]"),
        ({"logprobs": 5}, "logprobs=5: of drawn tokens alone"),
        ({"n": 2}, "n=2 is not offered"),
        ({"stream": True}, "stream=True is not offered"),
    ],
)
def test_what_cannot_be_asked_for(body: dict[str, Any], message: str) -> None:
    given = body if "prompt" in body or not body or "promt" in body else {"prompt": [1], **body}
    with pytest.raises(BadRequest, match=message) as caught:
        read(given, LIMITS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"[1]", "the request is list, not a JSON object"),
        (b'{"temperature": NaN}', "NaN is not a number"),
        (b'{"temperature": Infinity}', "Infinity is not a number"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_what_is_not_json(content: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parsed(content)


def answered(found: Continuation, **fields: Any) -> dict[str, Any]:
    asked = read({"prompt": TOKENIZER.encode("the"), **fields}, LIMITS)
    return answer(7, asked, found, WEIGHTS, TOKENIZER)


def drawn(text: str, finish: str, *more: int) -> Continuation:
    tokens = [*TOKENIZER.encode(text), *more]
    values = [-float(place) for place in range(len(tokens))]
    return Continuation(tokens, values, [2 * value for value in values], [4] * len(tokens), finish)


def test_an_answer() -> None:
    found = answered(drawn("vocab", "length"), logprobs=0, return_token_ids=True)
    tokens = TOKENIZER.encode("vocab")
    (choice,) = found["choices"]
    assert (found["model"], found["weight_version"], found["id"]) == ("w", 4, "cmpl-7")
    assert choice["text"] == "vocab" and choice["token_ids"] == tokens
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    assert choice["logprobs"]["tokens"] == [TOKENIZER.decode([token]) for token in tokens]
    assert choice["logprobs"]["token_logprobs"][:2] == [0.0, -1.0]
    assert choice["logprobs"]["raw_token_logprobs"][:2] == [0.0, -2.0]
    prompt = len(TOKENIZER.encode("the"))
    assert found["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(tokens),
        "total_tokens": prompt + len(tokens),
    }
    assert json.loads(json.dumps(found)) == found


def test_only_what_is_asked_for_is_told() -> None:
    (choice,) = answered(drawn("vocab", "length"))["choices"]
    assert choice["logprobs"] is None and "token_ids" not in choice
    told = answered(drawn("a", "length"), logprobs=1, return_tokens_as_token_ids=True)
    tokens = told["choices"][0]["logprobs"]["tokens"]
    assert tokens == [f"token_id:{token}" for token in TOKENIZER.encode("a")]


def test_how_it_ended() -> None:
    def choice(found: Continuation, **fields: Any) -> tuple[str, str | None]:
        (one,) = answered(found, **fields)["choices"]
        return one["text"], one["stop_reason"]

    assert choice(drawn("vo", "stop", EOD)) == ("vo", None)
    assert choice(drawn("vo", "stop", EOD), skip_special_tokens=False)[0] == "vo<|endoftext|>"
    assert choice(drawn("vocab", "stop"), stop=["never", "ca"]) == ("vo", "ca")
    kept = choice(drawn("vocab", "stop"), stop="ca", include_stop_str_in_output=True)
    assert kept == ("vocab", "ca")


def test_what_was_begun_is_not_told_again() -> None:
    begun, tokens = TOKENIZER.encode("e"), TOKENIZER.encode("vo")
    found = drawn("", "length", *begun, *tokens)
    told = answered(found, begun=len(begun), return_token_ids=True, logprobs=1)
    (choice,) = told["choices"]
    assert choice["token_ids"] == tokens
    assert len(choice["logprobs"]["token_logprobs"]) == len(tokens)
