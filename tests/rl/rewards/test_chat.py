"""Questions to a server that does not always answer."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_m1.errors import InputError
from megatron_m1.rl.rewards import chat
from megatron_m1.rl.rewards.chat import Chat
from megatron_m1.rl.rewards.config import GenerativeConfig
from megatron_m1.rl.rewards.verdict import VerifierFailed
from tests.rl.rewards.judge_server import Reply, judge_server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_FIRST_PAUSE", 0.01)


def config(url: str, seconds: float = 5.0, retries: int = 2, **others: object) -> GenerativeConfig:
    return GenerativeConfig(url=url, seconds=seconds, retries=retries, **others)  # type: ignore[arg-type]


def test_a_question_and_its_answer() -> None:
    with judge_server(lambda question, _: Reply(question.upper())) as server:
        asked = config(f"{server.url}/", model="m", temperature=0.5, max_tokens=7)
        assert Chat(asked).ask("grüezi") == "GRÜEZI"
    assert server.keys == [None]
    (request,) = server.requests
    assert {name: request[name] for name in ("model", "temperature", "max_tokens")} == {
        **{"model": "m", "temperature": 0.5, "max_tokens": 7}
    }


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with judge_server(lambda *_: Reply("yes")) as server:
        asked = config(server.url, key_variable="JUDGE_KEY_OF_TEST")
        with pytest.raises(InputError, match="variable JUDGE_KEY_OF_TEST, .* is not set"):
            Chat(asked)
        monkeypatch.setenv("JUDGE_KEY_OF_TEST", "k")
        assert Chat(asked).ask("?") == "yes"
    assert server.keys == ["Bearer k"]


def test_no_server_is_configured() -> None:
    with pytest.raises(InputError, match="reward.generative.url is missing"):
        Chat(GenerativeConfig())


@pytest.mark.parametrize(
    "failure",
    [
        Reply(status=500, body=b"broken"),
        Reply(status=503),
        Reply(status=429),
        Reply(body=b"not json"),
        Reply(body=b"{}"),
        Reply(body=b'{"choices": []}'),
        Reply(body=b'{"choices": [{"message": {"content": null}}]}'),
        Reply(body=b"[]"),
    ],
    ids=lambda reply: f"{reply.status} {reply.body[:20]!r}",
)
def test_failures_that_pass(failure: Reply) -> None:
    with judge_server(lambda _, number: Reply("yes") if number == 3 else failure) as server:
        assert Chat(config(server.url)).ask("?") == "yes"
    assert len(server.questions) == 3


def test_failures_that_stay() -> None:
    with (
        judge_server(lambda *_: Reply(status=500, body=b"broken")) as server,
        pytest.raises(VerifierFailed, match="did not answer: .*status 500.*broken"),
    ):
        Chat(config(server.url)).ask("?")
    assert len(server.questions) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_no_retry_mends(status: int) -> None:
    with (
        judge_server(lambda *_: Reply(status=status, body=b"no such model")) as server,
        pytest.raises(VerifierFailed, match=f"status {status}: b'no such model'"),
    ):
        Chat(config(server.url)).ask("?")
    assert len(server.questions) == 1


@pytest.mark.parametrize("slow", [Reply("x", delay=3.0), Reply("x" * 100, pause=0.05)])
def test_a_server_that_is_too_slow(slow: Reply) -> None:
    """Before its first byte, or between its bytes."""
    with judge_server(lambda *_: slow) as server:
        started = time.monotonic()
        with pytest.raises(VerifierFailed, match="did not answer"):
            Chat(config(server.url, seconds=0.5)).ask("?")
        assert time.monotonic() - started < 2.5


def test_an_answer_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_MOST_BYTES", 1000)
    with (
        judge_server(lambda *_: Reply("x" * 2000)) as server,
        pytest.raises(VerifierFailed, match="more than 1000 bytes"),
    ):
        Chat(config(server.url, retries=0)).ask("?")


def test_nobody_listens() -> None:
    with judge_server(lambda *_: Reply("x")) as server:
        pass
    with pytest.raises(VerifierFailed, match="did not answer: ConnectError"):
        Chat(config(server.url)).ask("?")


def test_many_threads() -> None:
    with judge_server(lambda question, _: Reply(question, delay=0.05)) as server:
        asking = Chat(config(server.url))
        with ThreadPoolExecutor(16) as threads:
            questions = [str(number) for number in range(64)]
            assert list(threads.map(asking.ask, questions)) == questions
