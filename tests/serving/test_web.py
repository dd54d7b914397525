"""The HTTP side with a service that has nothing to draw with."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import httpx
import pytest

from megatron_m1.config import ServerConfig
from megatron_m1.errors import InputError
from megatron_m1.inference.requests import Continuation
from megatron_m1.serving.protocol import Asked, Limits, Weights
from megatron_m1.serving.service import Answer, NotServed, Unavailable
from megatron_m1.serving.web import listening
from tests.serving.served import TOKENIZER


class Repeating:
    """Answers with the prompt's first token, or with what ``index`` says."""

    limits = Limits(TOKENIZER, 300, 20)
    errors = {1: NotServed("other"), 2: Unavailable("none"), 3: KeyError("odd")}

    def __init__(self) -> None:
        self.weights: Weights | None = Weights("w", 1)
        self.dropped = threading.Event()

    def ask(self, asked: Asked) -> tuple[int, Future[Answer]]:
        future: Future[Answer] = Future()
        token, index = asked.sequence.prompt[0], asked.sequence.index
        if index in self.errors:
            future.set_exception(self.errors[index])
        elif index == 0:
            found = Continuation([token], [-1.0], [-1.0], [1], "length")
            future.set_result(Answer(found, Weights("w", 1)))
        return 5, future

    def drop(self, ticket: int) -> None:
        assert ticket == 5
        self.dropped.set()

    def load(self, folder: str, weights: Weights) -> Future[Weights]:
        raise AssertionError("what is no checkpoint is not loaded")


@pytest.fixture
def service() -> Repeating:
    return Repeating()


@pytest.fixture
def client(service: Repeating) -> Iterator[httpx.Client]:
    with (
        listening(ServerConfig(port=0), service) as url,  # type: ignore[arg-type]
        httpx.Client(base_url=url, timeout=10) as found,
    ):
        yield found


def test_routes(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["weight_version"], model["max_model_len"]) == ("w", 1, 20)
    found = client.post("/v1/completions", json={"prompt": [9], "return_token_ids": True})
    assert found.json()["choices"][0]["token_ids"] == [9]


def test_without_weights_it_is_not_healthy(client: httpx.Client, service: Repeating) -> None:
    service.weights = None
    assert client.get("/health").status_code == 503
    assert client.get("/v1/models").json()["data"] == []


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("GET", "/", None, 404, "there is no GET /"),
        ("GET", "/v1/completions", None, 404, "there is no GET /v1/completions"),
        ("POST", "/v1/chat/completions", {}, 404, "there is no POST /v1/chat/completions"),
        ("POST", "/v1/completions", [], 400, "the request is list, not a JSON object"),
        ("POST", "/v1/completions", {"prompt": [999]}, 400, "prompt has ids outside"),
        ("POST", "/v1/completions", {"prompt": [9], "index": 1}, 404, "other"),
        ("POST", "/v1/completions", {"prompt": [9], "index": 2}, 503, "none"),
        ("POST", "/v1/completions", {"prompt": [9], "index": 3}, 500, "KeyError"),
        ("POST", "/load_weights", {}, 400, "folder=None is no checkpoint"),
        ("POST", "/load_weights", {"path": "a"}, 400, "path is not a field"),
    ],
)
def test_errors_have_a_status_and_a_sentence(
    client: httpx.Client, method: str, path: str, content: Any, status: int, message: str
) -> None:
    found = client.request(method, path, json=content)
    assert found.status_code == status and message in found.json()["error"]["message"]
    # The connection is still good for another.
    assert client.get("/health").status_code == 200


def test_a_length_that_cannot_be(client: httpx.Client) -> None:
    url = client.base_url
    for length in ("", "Content-Length: -1\r\n", "Content-Length: 99999999999\r\n"):
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{length}\r\n".encode())
            assert b" 400 " in connection.recv(1000)


def test_a_caller_who_hangs_up_is_noticed(client: httpx.Client, service: Repeating) -> None:
    content = b'{"prompt": [9], "index": 7}'
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        assert not service.dropped.wait(1.5)
    assert service.dropped.wait(5)


def test_a_key_is_asked_for(monkeypatch: pytest.MonkeyPatch, service: Repeating) -> None:
    config = ServerConfig(port=0, key_variable="SERVER_KEY")
    with (
        pytest.raises(InputError, match="SERVER_KEY, which server.key_variable names, is not set"),
        listening(config, service),  # type: ignore[arg-type]
    ):
        pass
    monkeypatch.setenv("SERVER_KEY", "secret")
    with listening(config, service) as url:  # type: ignore[arg-type]
        body = {"prompt": [9]}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
        wrong = {"Authorization": "Bearer sécret".encode()}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=wrong).status_code == 401
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as connection:
            # It is not waited for the content of somebody without a key.
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n")
            connection.settimeout(5)
            assert b" 401 " in connection.recv(1000)
        headers = {"Authorization": "Bearer secret"}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).status_code == 200


def test_an_address_that_is_taken(client: httpx.Client, service: Repeating) -> None:
    port = client.base_url.port
    assert port
    with (
        pytest.raises(InputError, match=f"server.port={port} cannot be listened at: Address alr"),
        listening(ServerConfig(port=port), service),  # type: ignore[arg-type]
    ):
        pass
