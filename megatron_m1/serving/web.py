"""The HTTP side: a thread for each connection, JSON in and out."""

from __future__ import annotations

import hmac
import json
import os
import select
import socket
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

from megatron_m1.checkpoint.folders import is_whole
from megatron_m1.config import ServerConfig
from megatron_m1.errors import InputError, UserError
from megatron_m1.serving.protocol import BadRequest, Weights, answer, parsed, read
from megatron_m1.serving.service import NotServed, Service, Unavailable

T = TypeVar("T")
_MOST_BYTES = 64 << 20
_SECONDS = 1.0  # between looks for a caller that has hung up
_STATUS = {BadRequest: 400, UserError: 400, NotServed: 404, Unavailable: 503}


class _Gone(Exception):
    """The caller has hung up."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, config: ServerConfig, service: Service, key: str | None) -> None:
        super().__init__((config.host, config.port), _Handler)
        self.service, self.key = service, key

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: callers may leave when they like."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    # Headers and content leave together.
    wbufsize = 1 << 16

    def do_GET(self) -> None:
        self._answer({"/health": self._health, "/v1/models": self._models}.get(self.path))

    def do_POST(self) -> None:
        routes = {"/v1/completions": self._complete, "/load_weights": self._load}
        self._answer(routes.get(self.path))

    def log_message(self, *_: object) -> None:
        """Nothing."""

    @property
    def _service(self) -> Service:
        return self.server.service

    def _answer(self, route: Any) -> None:
        try:
            if not self._may_ask():
                # Nothing more is read of who has no key.
                self.close_connection = True
                self._send(401, _error(401, "the key of Authorization is not the server's"))
                return
            content = self._content()
            if route is None:
                self._send(404, _error(404, f"there is no {self.command} {self.path}"))
            else:
                self._send(200, route(content))
        except _Gone:
            self.close_connection = True
        except tuple(_STATUS) as error:
            status = next(code for kind, code in _STATUS.items() if isinstance(error, kind))
            self._send(status, _error(status, str(error)))
        except Exception as error:
            traceback.print_exc()
            self._send(500, _error(500, f"{type(error).__name__}: {error}"))

    def _may_ask(self) -> bool:
        given, wanted = self.headers.get("Authorization", ""), f"Bearer {self.server.key}"
        return not self.server.key or hmac.compare_digest(given.encode(), wanted.encode())

    def _content(self) -> bytes:
        length = self.headers.get("Content-Length", "0" if self.command == "GET" else "")
        if not length.isdecimal() or int(length) > _MOST_BYTES:
            # What follows cannot be told from another request.
            self.close_connection = True
            raise BadRequest(f"Content-Length={length or 'missing'} must be 0 to {_MOST_BYTES}")
        return self.rfile.read(int(length))

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        with suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def _health(self, content: bytes) -> dict[str, Any]:
        if self._service.weights is None:
            raise Unavailable("the server has no whole weights: load others")
        return {"status": "ok"}

    def _models(self, content: bytes) -> dict[str, Any]:
        weights, places = self._service.weights, self._service.limits.places
        data = [] if weights is None else [_model(weights, places)]
        return {"object": "list", "data": data}

    def _complete(self, content: bytes) -> dict[str, Any]:
        limits = self._service.limits
        asked = read(parsed(content), limits)
        ticket, future = self._service.ask(asked)
        found = self._wait(future, ticket)
        return answer(ticket, asked, found.continuation, found.weights, limits.tokenizer)

    def _load(self, content: bytes) -> dict[str, Any]:
        folder, weights = _weights(parsed(content))
        self._service.load(folder, weights).result()
        return _model(weights, self._service.limits.places)

    def _wait(self, future: Future[T], ticket: int) -> T:
        while True:
            try:
                return future.result(_SECONDS)
            except TimeoutError:
                if _has_hung_up(self.connection):
                    self._service.drop(ticket)
                    raise _Gone from None


def _weights(body: dict[str, Any]) -> tuple[str, Weights]:
    """The folder to load, and what its weights are called."""
    unknown = [name for name in body if name not in ("folder", "name", "version")]
    if unknown:
        raise BadRequest(f"{unknown[0]} is not a field that this server knows")
    folder, version = body.get("folder"), body.get("version", 0)
    name = body.get("name", folder)
    if not isinstance(folder, str) or not is_whole(Path(folder)):
        raise BadRequest(f"folder={folder} is no checkpoint: give the folder of one, as it is here")
    if not isinstance(name, str) or type(version) is not int:
        raise BadRequest(f"name={name} must be a text and version={version} a whole number")
    return folder, Weights(name, version)


def _model(weights: Weights, places: int) -> dict[str, Any]:
    return {
        "id": weights.name,
        "object": "model",
        "owned_by": "megatron_m1",
        "weight_version": weights.version,
        "max_model_len": places,
    }


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _has_hung_up(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    try:
        return bool(poll.poll(0)) and not connection.recv(1, socket.MSG_PEEK)
    except OSError:
        return True


@contextmanager
def listening(config: ServerConfig, service: Service) -> Iterator[str]:
    """Listen until the block ends; the address.

    Raises:
        InputError: the address cannot be had, or the key is missing.
    """
    key = None
    if config.key_variable:
        key = os.environ.get(config.key_variable)
        if not key:
            raise InputError(
                f"the environment variable {config.key_variable}, which server.key_variable "
                "names, is not set"
            )
    try:
        server = _Server(config, service, key)
    except OSError as error:
        raise InputError(
            f"server.host={config.host} with server.port={config.port} cannot be listened at: "
            f"{error.strerror or error}"
        ) from error
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://{config.host}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
