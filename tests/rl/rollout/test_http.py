"""What the engine asks a server for, and what it makes of the answers, good and bad."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import pytest

from megatron_m1.data.tokenizer import train_bpe
from megatron_m1.rl.rollout.engine import Request, SamplingParams
from megatron_m1.rl.rollout.http import HttpEngine, ServerError, ServerOptions
from megatron_m1.rl.samples import Response
from parallel.layout import Layout
from tests.rl.rollout.scripted import Script, server

TOKENIZER = train_bpe(["abc"], 260)
EOD = TOKENIZER.eod
SAMPLING = SamplingParams(max_new_tokens=5)
REQUEST = Request(3, 1, (10, 11), 7, SAMPLING)


@pytest.fixture(autouse=True)
def _groups(single_process: Layout) -> None:
    """Answers are shared with all processes, also where there is one."""


def answer(model: str, tokens: list[int], finish: str = "length", **choice: Any) -> dict[str, Any]:
    """As vLLM gives it."""
    logprobs = {"tokens": [f"token_id:{token}" for token in tokens]}
    logprobs["token_logprobs"] = [-0.5 - token / 100 for token in tokens]
    choice = {"finish_reason": finish, "logprobs": logprobs, "stop_reason": None} | choice
    return {"model": model, "choices": [choice], "usage": {"completion_tokens": len(tokens)}}


def published(version: int) -> str:
    return f"policy-{version}"


def engine(url: str, **options: Any) -> HttpEngine:
    given = ServerOptions(**{"url": url, "timeout": 5.0, "backoff": 0.01, "attempts": 3} | options)
    assert not given.problems()
    return HttpEngine(given, TOKENIZER, published)


def drawn(script: Script, *requests: Request, **options: Any) -> tuple[list[Response], HttpEngine]:
    with server(script) as (url, _):
        asking = engine(url, **options)
        return list(asking.generate(requests or [REQUEST])), asking


def test_what_is_asked_for() -> None:
    sampling = SamplingParams(
        temperature=0.5, top_p=0.9, top_k=8, max_new_tokens=9, stop=("x",), repetition_length=3
    )
    with server(lambda n, body: (200, answer(body["model"], [5]))) as (url, bodies):
        list(engine(url).generate([replace(REQUEST, sampling=sampling)]))
    (body,) = bodies
    assert body.pop("seed") >= 0
    assert body == {
        "model": "policy-0",
        "prompt": [10, 11],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 8,
        "stop": ["x"],
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }


def test_an_answer_becomes_a_response() -> None:
    tokens = [20, 21, EOD]
    (found,), asking = drawn(lambda n, body: (200, answer("policy-0", tokens, "stop")))
    logprobs = [-0.7, -0.71, -0.5]
    assert found == Response(3, 1, tokens, logprobs, logprobs, [0, 0, 0], "stop")
    counts = {"tokens": 3, "tokens_without_logprobs": 0, "encoded_otherwise": 0}
    assert asking.take_counts() == counts
    assert asking.take_counts() == {}


def test_a_stop_token_that_is_left_out_was_drawn() -> None:
    (found,), _ = drawn(lambda n, body: (200, answer("policy-0", [20], "stop")))
    assert found.tokens == [20, EOD] and math.isnan(found.raw_logprobs[1])
    (found,), _ = drawn(lambda n, body: (200, answer("policy-0", [20], "stop", stop_reason="x")))
    assert found.tokens == [20]


@pytest.mark.parametrize(("told", "raw_is_known"), [("raw", True), ("sampled", False)])
def test_log_probabilities_that_are_not_told_are_nan(told: str, raw_is_known: bool) -> None:
    request = replace(REQUEST, sampling=replace(SAMPLING, temperature=0.5))
    (found,), asking = drawn(
        lambda n, body: (200, answer("policy-0", [20])), request, logprobs_are=told
    )
    assert math.isnan(found.raw_logprobs[0]) != raw_is_known
    assert math.isnan(found.logprobs[0]) == raw_is_known
    assert asking.counts["tokens_without_logprobs"] == (not raw_is_known)


def test_ids_alone_are_enough() -> None:
    (found,), _ = drawn(
        lambda n, body: (200, answer("policy-0", [], token_ids=[20, 21], logprobs=None))
    )
    assert found.tokens == [20, 21] and all(map(math.isnan, found.raw_logprobs))


@pytest.mark.parametrize("fault", [(500, {}), (503, {}), (429, {}), (0, None)])
def test_what_passes_is_tried_again(fault: tuple[int, Any]) -> None:
    (found,), asking = drawn(lambda n, body: fault if n < 2 else (200, answer("policy-0", [20])))
    assert found.tokens == [20] and asking.counts["retries"] == 2


def test_a_server_that_takes_too_long_is_asked_again() -> None:
    slow = threading.Event()

    def script(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        if number == 0:
            slow.wait(5)
        return 200, answer("policy-0", [20])

    (found,), asking = drawn(script, timeout=0.3)
    slow.set()
    assert found.tokens == [20] and asking.counts["retries"] == 1


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ((500, {"why": "tired"}), "has not answered 3 times; the last time: status 500: .*tired"),
        ((0, None), "has not answered 3 times; the last time: RemoteProtocolError"),
        ((400, {"why": "no"}), "refuses a request, status 400: .*no"),
        ((200, b"{"), "answers like no server of rollout.server=vllm"),
        (
            (200, {"choices": []}),
            "answers like no server of rollout.server=vllm: the answer has no",
        ),
        ((200, answer("policy-0", [1], logprobs=None)), "no 'token_ids'"),
    ],
)
def test_what_does_not_pass_ends_the_run(script: tuple[int, Any], message: str) -> None:
    with pytest.raises(ServerError, match=message):
        drawn(lambda n, body: script)


def test_no_server() -> None:
    with server(lambda n, body: (200, {})) as (url, _):
        pass
    with pytest.raises(ServerError, match="has not answered 3 times; the last time: ConnectError"):
        list(engine(url).generate([REQUEST]))


def test_answers_of_other_weights_are_not_taken() -> None:
    def late(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        """The first answers after an update are still of the old weights."""
        return 200, answer("policy-0" if number < 3 else body["model"], [20])

    with server(late) as (url, _):
        asking = engine(url)
        (old,) = asking.generate([REQUEST])
        asking.weights_changed(1)
        (new,) = asking.generate([REQUEST])
        assert (old.versions, new.versions, asking.version) == ([0], [1], 1)
        assert asking.counts["stale"] == 2
    with pytest.raises(ServerError, match="answers with model policy-9, not policy-0"):
        drawn(lambda n, body: (200, answer("policy-9", [20])))


def test_a_paused_response_goes_on() -> None:
    begun = Response(3, 1, [30, 31], [-1.0, -2.0], [-3.0, -4.0], [0, 0], "paused")
    with server(lambda n, body: (200, answer(body["model"], [20, EOD], "stop"))) as (url, bodies):
        asking = engine(url)
        list(asking.generate([REQUEST]))
        asking.weights_changed(4)
        (found,) = asking.generate([replace(REQUEST, begun=begun)])
    first, second = bodies
    assert second["prompt"] == [10, 11, 30, 31] and second["max_tokens"] == 3
    assert second["seed"] != first["seed"]
    assert found == Response(
        *(3, 1, [30, 31, 20, EOD]),
        *([-1.0, -2.0, -0.7, -0.5], [-3.0, -4.0, -0.7, -0.5]),
        *([0, 0, 4, 4], "stop"),
    )


def test_the_rest_is_paused_once_enough_have_finished() -> None:
    begun = Response(3, 2, [9], [-1.0], [-1.0], [0], "paused")
    full = replace(begun, index=3, tokens=[9] * 5)
    release = threading.Event()

    def script(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        if body["prompt"] != [50]:
            release.wait(5)
        return 200, answer("policy-0", [20])

    requests = [
        replace(REQUEST, index=0),
        replace(REQUEST, index=1, prompt=(50,)),
        replace(REQUEST, index=2, begun=begun),
        replace(REQUEST, index=3, begun=full),
    ]
    with server(script) as (url, _):
        found = list(engine(url, timeout=10.0).generate(requests, stop_after=2))
        release.set()
    assert [(one.index, one.finish, one.tokens) for one in found] == [
        (3, "length", [9] * 5),
        (1, "length", [20]),
        (0, "paused", []),
        (2, "paused", [9]),
    ]


def test_a_repetition_is_cut_off() -> None:
    sampling = replace(SAMPLING, repetition_length=2, repetition_probability=0.5)
    values = [-0.1, -0.9, -0.2, -0.3, -0.1]
    logprobs = {"tokens": [f"token_id:{n}" for n in range(5)], "token_logprobs": values}
    (found,), _ = drawn(
        lambda n, body: (200, answer("policy-0", [], logprobs=logprobs)),
        replace(REQUEST, sampling=sampling),
    )
    assert (found.tokens, found.finish) == ([0, 1, 2, 3], "repetition")
    assert found.raw_logprobs == values[:4] and len(found.versions) == 4


def test_many_at_a_time_and_no_more() -> None:
    busy, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(4)

    def script(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        together.wait(5)
        with lock:
            busy -= 1
        return 200, answer("policy-0", [20])

    found, _ = drawn(script, *(replace(REQUEST, index=n) for n in range(12)), concurrency=4)
    assert {one.index for one in found} == set(range(12)) and most == 4


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"url": "localhost:8000"}, "rollout.url=localhost:8000 must begin with http://"),
        ({"server": "tgi"}, "rollout.server=tgi is not one of vllm, sglang, transformers"),
        ({"logprobs_are": "odd"}, "rollout.logprobs_are=odd is not one of raw, sampled"),
        ({"attempts": 0}, "rollout.attempts=0 must be at least 1"),
        ({"timeout": 0}, "rollout.timeout=0 must be positive"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], problem: str) -> None:
    (found,) = ServerOptions(**{"url": "http://127.0.0.1"} | options).problems()
    assert found.startswith(problem)
