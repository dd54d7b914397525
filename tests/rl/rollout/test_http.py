"""What the engine asks servers for, and what it makes of the answers, good and bad."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_m1.errors import EXIT_UNFIT, InputError
from megatron_m1.rl.rollout.client import ServerError
from megatron_m1.rl.rollout.config import HttpConfig
from megatron_m1.rl.rollout.engine import SamplingParams
from megatron_m1.rl.samples import Response
from parallel.layout import Layout
from tests.distributed import Pool
from tests.rl.rollout.answers import EOD, REQUEST, SAMPLING, TOKENIZER, answer, drawn, engine
from tests.rl.rollout.scripted import Answer, server


@pytest.fixture(autouse=True)
def _groups(single_process: Layout) -> None:
    """Answers are shared with all processes, also where there is one."""


FULL = SamplingParams(
    temperature=0.5, top_p=0.9, top_k=8, max_new_tokens=9, stop=("x",), repetition_length=3
)
IDS = {
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
}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"server": "megatron_m1"},
            {
                "model": "policy-0",
                "include_stop_str_in_output": True,
                "seed": 7,
                "prompt_id": 3,
                "index": 1,
                "begun": 0,
                "stop_token_ids": [EOD],
                "repetition_length": 3,
                "repetition_probability": 0.99,
            },
        ),
        (
            {"server": "vllm", "model": "m"},
            {
                "model": "m",
                "include_stop_str_in_output": True,
                "seed": 323752561,
                "cache_salt": "policy-0",
            },
        ),
        (
            {"server": "sglang", "model": "m"},
            {"model": "m", "no_stop_trim": True, "seed": 323752561},
        ),
    ],
    ids=["megatron_m1", "vllm", "sglang"],
)
def test_what_is_asked_for(options: dict[str, Any], expected: dict[str, Any]) -> None:
    said = "m" if options["server"] == "vllm" else "policy-0"
    with server(lambda n, body: (200, answer(said, [5]))) as served:
        list(engine(served.url, **options).generate([replace(REQUEST, sampling=FULL)]))
    assert served.bodies == [IDS | expected]


def test_the_key_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", "secret")
    with server(lambda n, body: (200, answer("policy-0", [5]))) as served:
        list(engine(served.url, key_variable="SERVER_KEY").generate([REQUEST]))
    assert served.keys == {"Bearer secret"}
    monkeypatch.delenv("SERVER_KEY")
    with pytest.raises(InputError, match="SERVER_KEY, which rollout.http.key_variable names"):
        list(engine(served.url, key_variable="SERVER_KEY").generate([REQUEST]))


def refused() -> str:
    options = {"server": "transformers", "key_variable": "KEY_OF_NOBODY"}
    with pytest.raises(InputError) as refusal:
        list(engine("http://127.0.0.1:9", **options).generate([REQUEST]))
    return str(refusal.value)


def test_a_key_that_is_missing_ends_all_processes(ranks: Callable[[int], Pool]) -> None:
    first, second = ranks(2).run(refused)
    assert first == second and "KEY_OF_NOBODY" in first


def test_an_answer_becomes_a_response() -> None:
    tokens = [20, 21, EOD]
    (found,), asking = drawn(lambda n, body: (200, answer("policy-0", tokens, "stop")))
    sampled, raw = [-0.7, -0.71, -0.5], [-1.7, -1.71, -1.5]
    assert found == Response(3, 1, tokens, sampled, raw, [0, 0, 0], "stop")
    counts = {"tokens": 3, "tokens_without_logprobs": 0, "encoded_otherwise": 0}
    assert asking.counts.taken() == counts
    assert asking.counts.taken() == {}


def test_a_stop_token_that_is_left_out_was_drawn() -> None:
    (found,), _ = drawn(lambda n, body: (200, answer("policy-0", [20], "stop")))
    assert found.tokens == [20, EOD] and math.isnan(found.raw_logprobs[1])
    (found,), _ = drawn(lambda n, body: (200, answer("policy-0", [20], "stop", stop_reason="x")))
    assert found.tokens == [20]


def test_sglang_names_the_stop_text_in_a_field_of_its_own() -> None:
    options = {"server": "sglang", "model": "m"}
    given = answer("policy-0", [20], "stop", matched_stop="x")
    (found,), _ = drawn(lambda n, body: (200, given), **options)
    assert found.tokens == [20]
    given = answer("policy-0", [20], "stop", matched_stop=EOD)
    (found,), _ = drawn(lambda n, body: (200, given), **options)
    assert found.tokens == [20, EOD]


def test_a_response_that_a_server_gave_up_is_drawn_again() -> None:
    (found,), asking = drawn(
        lambda n, body: (200, answer("policy-0", [20 + n], "length" if n else "abort"))
    )
    assert (found.tokens, found.finish) == ([21], "length")
    assert asking.counts.taken()["retries"] == 1


@pytest.mark.parametrize(("told", "raw_is_known"), [("raw", True), ("sampled", False)])
def test_log_probabilities_that_are_not_told_are_nan(told: str, raw_is_known: bool) -> None:
    request = replace(REQUEST, sampling=replace(SAMPLING, temperature=0.5))
    options = {"server": "vllm", "model": "m", "logprobs_are": told}
    (found,), asking = drawn(lambda n, body: (200, answer("m", [20])), request, **options)
    assert math.isnan(found.raw_logprobs[0]) != raw_is_known
    assert math.isnan(found.logprobs[0]) == raw_is_known
    assert asking.counts.taken()["tokens_without_logprobs"] == (not raw_is_known)


def test_ids_alone_are_enough() -> None:
    (found,), _ = drawn(
        lambda n, body: (200, answer("policy-0", [], token_ids=[20, 21], logprobs=None))
    )
    assert found.tokens == [20, 21] and all(map(math.isnan, found.raw_logprobs))


@pytest.mark.parametrize("fault", [(500, {}), (503, {}), (429, {}), (404, {}), (0, None)])
def test_what_passes_is_tried_again(fault: tuple[int, Any]) -> None:
    (found,), asking = drawn(lambda n, body: fault if n < 2 else (200, answer("policy-0", [20])))
    assert found.tokens == [20] and asking.counts.taken()["retries"] == 2


def test_one_server_stands_in_for_another() -> None:
    with (
        server(lambda n, body: (500, {})) as broken,
        server(lambda n, body: (200, answer("policy-0", [20]))) as whole,
    ):
        found = list(engine(broken.url, whole.url + "/").generate([REQUEST] * 4))
    assert len(found) == len(whole.bodies) == 4 and len(broken.bodies) == 2


def test_a_server_that_takes_too_long_is_asked_again() -> None:
    slow = threading.Event()

    def script(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        if number == 0:
            slow.wait(5)
        return 200, answer("policy-0", [20])

    (found,), asking = drawn(script, timeout=0.3)
    slow.set()
    assert found.tokens == [20] and asking.counts.taken()["retries"] == 1


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ((500, {"why": "tired"}), "no answer in 3 attempt.* status 500: .*tired"),
        ((0, None), "no answer in 3 attempt.* RemoteProtocolError"),
        ((400, {"why": "no"}), "refuses a request, status 400: .*no"),
        ((200, b"{"), "answers no JSON"),
        (
            (200, {"choices": []}),
            "answers like no server of rollout.http.server=megatron_m1: the answer has no",
        ),
        ((200, answer("policy-0", [1], logprobs=None)), "no 'token_ids'"),
        ((200, answer("policy-0", [1], logprobs={"token_logprobs": [0, 0]})), "no 'token_ids'"),
    ],
)
def test_what_does_not_pass_ends_the_run(script: tuple[int, Any], message: str) -> None:
    with pytest.raises(ServerError, match=message) as caught:
        drawn(lambda n, body: script)
    assert caught.value.exit_code == EXIT_UNFIT and "\n" not in str(caught.value)


def test_no_server() -> None:
    with server(lambda n, body: (200, {})) as served:
        pass
    with pytest.raises(ServerError, match="no answer in 3 attempt.*load_weights: ConnectError"):
        list(engine(served.url).generate([REQUEST]))


def test_what_others_bring_is_given_before_the_failure() -> None:
    """Responses that are paid for reach the journal; nothing more is asked for."""
    release = threading.Event()

    def script(number: int, body: dict[str, Any]) -> Answer:
        if body["index"] == 0:
            return 400, "no"
        release.wait(5)
        return 200, answer("policy-0", [20])

    requests = [replace(REQUEST, index=index) for index in range(9)]
    found = []
    with server(script) as served:
        threading.Timer(0.3, release.set).start()
        with pytest.raises(ServerError, match="status 400"):
            for response in engine(served.url, concurrency=3).generate(requests):
                found.append(response.index)
    assert sorted(found) == [1, 2] or sorted(found) == [1, 2, 3]
    assert len(served.bodies) == len(found) + 1


def test_a_paused_response_goes_on() -> None:
    begun = Response(3, 1, [30, 31], [-1.0, -2.0], [-3.0, -4.0], [0, 0], "paused")
    with server(lambda n, body: (200, answer(body["model"], [20, EOD], "stop"))) as served:
        asking = engine(served.url)
        list(asking.generate([REQUEST]))
        asking.weights_changed(4)
        (found,) = asking.generate([replace(REQUEST, begun=begun)])
    _, second = served.bodies
    assert second["prompt"] == [10, 11, 30, 31] and second["max_tokens"] == 3
    assert second["begun"] == 2
    assert found == Response(
        *(3, 1, [30, 31, 20, EOD]),
        *([-1.0, -2.0, -0.7, -0.5], [-3.0, -4.0, -1.7, -1.5]),
        *([0, 0, 4, 4], "stop"),
    )


def test_other_servers_draw_anew_for_what_goes_on() -> None:
    begun = Response(3, 1, [30, 31], [-1.0, -2.0], [-3.0, -4.0], [0, 0], "paused")
    with server(lambda n, body: (200, answer("m", [20]))) as served:
        asking = engine(served.url, server="vllm", model="m", concurrency=1)
        list(asking.generate([REQUEST, replace(REQUEST, begun=begun)]))
    first, second = served.bodies
    assert first["seed"] != second["seed"]


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
    with server(script) as served:
        found = list(engine(served.url, timeout=10.0).generate(requests, stop_after=2))
        release.set()
    assert [(one.index, one.finish, one.tokens) for one in found] == [
        (3, "length", [9] * 5),
        (1, "length", [20]),
        (0, "paused", []),
        (2, "paused", [9]),
    ]


REPEATING = replace(SAMPLING, repetition_length=2, repetition_probability=0.5)


@pytest.mark.parametrize(
    ("values", "finish", "kept", "expected"),
    [
        ([-0.1, -0.9, -0.2, -0.3, -0.1], "length", 4, "repetition"),
        ([-0.1, -0.9, -0.2, -0.9, -0.1], "length", 5, "length"),
        # At the last token the native engine looks for the stop token first.
        ([-0.9, -0.9, -0.2, -0.3], "length", 4, "repetition"),
        ([-0.9, -0.9, -0.2, -0.3], "stop", 4, "stop"),
    ],
)
def test_a_repetition_is_cut_off(
    values: list[float], finish: str, kept: int, expected: str
) -> None:
    tokens = [*range(20, 20 + len(values) - 1), EOD]
    logprobs = {"token_logprobs": values, "raw_token_logprobs": values}
    script = answer("policy-0", [], finish, logprobs=logprobs, token_ids=tokens)
    (found,), _ = drawn(lambda n, body: (200, script), replace(REQUEST, sampling=REPEATING))
    assert (found.tokens, found.finish) == (tokens[:kept], expected)
    assert found.raw_logprobs == values[:kept] and len(found.versions) == kept


def test_a_repetition_goes_on_over_a_pause() -> None:
    begun = Response(3, 1, [30], [-0.1], [-0.1], [0], "paused")
    values = [-0.2, -0.1]
    logprobs = {"token_logprobs": values, "raw_token_logprobs": values}
    script = answer("policy-0", [], logprobs=logprobs, token_ids=[20, 21])
    request = replace(REQUEST, sampling=REPEATING, begun=begun)
    (found,), _ = drawn(lambda n, body: (200, script), request)
    assert (found.tokens, found.finish) == ([30, 20], "repetition")


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
        ({"urls": []}, r"rollout.http.urls=\[\] names no server"),
        ({"urls": ["localhost:8000"]}, "rollout.http.urls=localhost:8000 must begin with http://"),
        ({"server": "tgi"}, "rollout.http.server=tgi is not one of megatron_m1, vllm, sglang, tr"),
        ({"server": "vllm"}, "rollout.http.model=null: rollout.http.server=vllm is asked by"),
        ({"logprobs_are": "odd"}, "rollout.http.logprobs_are=odd is not one of raw, sampled"),
        ({"attempts": 0}, "rollout.http.attempts=0 must be at least 1"),
        ({"timeout": 0}, "rollout.http.timeout=0 must be positive"),
        ({"backoff": -1}, "rollout.http.backoff=-1 must not be negative"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], problem: str) -> None:
    (found,) = HttpConfig(**{"urls": ["http://127.0.0.1"]} | options).problems()
    assert re.match(problem, found)


def test_a_text_is_encoded_again_within_the_window() -> None:
    """As transformers tells it: with the revision, without ids, and longer than what was drawn."""

    def said(text: str, finish: str, drawn: int) -> Answer:
        choice = {"text": text, "finish_reason": finish}
        return 200, {
            "model": "folder-0@main",
            "choices": [choice],
            "usage": {"completion_tokens": drawn},
        }

    options = {"server": "transformers"}
    (whole,), asking = drawn(lambda n, body: said("abc", "stop", 4), **options)
    assert whole.tokens == [*TOKENIZER.encode("abc"), EOD] and whole.finish == "stop"
    assert all(map(math.isnan, whole.raw_logprobs)) and len(whole.raw_logprobs) == len(whole.tokens)
    (long,), asking = drawn(lambda n, body: said("zyxwvu", "length", 5), **options)
    assert long.tokens == TOKENIZER.encode("zyxwv") and long.finish == "length"
    assert asking.counts.taken()["encoded_otherwise"] == 1
    (empty,), _ = drawn(lambda n, body: said("", "length", 5), **options)
    assert empty.tokens == [EOD]
