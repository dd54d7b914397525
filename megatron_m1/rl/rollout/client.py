"""Requests to several servers of one model: spread over them, and sent again when one fails."""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, TypeVar

import httpx

from megatron_m1.errors import EXIT_UNFIT, InputError, UserError
from megatron_m1.rl.rollout.config import HttpConfig

T = TypeVar("T")
Send = Callable[[dict[str, Any]], Any]
"""JSON to a server, and the JSON that it answers."""

# 404: a server has other weights, as one has that is about to get those that are asked for.
_WORTH_ANOTHER_TRY = (404, 408, 425, 429)


class ServerError(UserError):
    """A server that does not answer, or not as such servers do."""

    exit_code = EXIT_UNFIT


class Rejected(Exception):
    """An answer that is not taken, though another one may be."""


class Counts:
    """What several threads count."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, **more: int) -> None:
        with self._lock:
            self._counts.update(more)

    def taken(self) -> dict[str, int]:
        """The numbers, which then start again from nothing."""
        with self._lock:
            counts, self._counts = dict(self._counts), Counter()
        return counts


class Client:
    """A context manager; several threads may ask at a time.

    Args:
        counts: of ``retries``.

    Attributes:
        given_up: once set, nothing is sent again.
    """

    def __init__(self, config: HttpConfig, counts: Counts) -> None:
        self._config, self._counts = config, counts
        # As many connections as there are threads that ask.
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(timeout=config.timeout, headers=_key(config), limits=limits)
        self._turns = itertools.count()
        self.given_up = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def post(self, path: str, attempt: Callable[[Send], T]) -> T:
        """What ``attempt`` makes of what a server answers, whichever it is.

        Raises:
            ServerError: no attempt brought an answer, or one says that another would not either.
        """
        first = next(self._turns) % len(self._config.urls)
        return self._post(self._config.urls[first:] + self._config.urls[:first], path, attempt)

    def post_to_each(self, path: str, content: dict[str, Any]) -> None:
        """Tell every server.

        Raises:
            ServerError: one did not take it.
        """
        for url in self._config.urls:
            self._post([url], path, lambda send: send(content))

    def _post(self, urls: Sequence[str], path: str, attempt: Callable[[Send], T]) -> T:
        problem, sent = "", 0
        for url in itertools.islice(itertools.cycle(urls), self._config.attempts):
            if sent:
                self._counts.add(retries=1)
                if self.given_up.wait(self._config.backoff * 2 ** (sent - 1)):
                    break
            sent += 1
            try:
                return attempt(partial(self._json, url.rstrip("/") + path))
            except Rejected as reason:
                problem = f"{url}{path}: {reason}"
        raise ServerError(
            f"rollout.http.urls={','.join(self._config.urls)}: no answer in {sent} attempt(s), the "
            f"last one to {problem}"
        )

    def _json(self, url: str, content: dict[str, Any]) -> Any:
        try:
            answer = self._client.post(url, json=content)
        except httpx.TransportError as error:
            raise Rejected(f"{type(error).__name__} {error}".strip()) from error
        status = answer.status_code
        said = f"status {status}: {answer.text[:300]}"
        if status >= 500 or status in _WORTH_ANOTHER_TRY:
            raise Rejected(said)
        if status != 200:
            raise ServerError(f"rollout.http.urls: {url} refuses a request, {said}")
        try:
            return answer.json()
        except ValueError as error:
            raise ServerError(f"rollout.http.urls: {url} answers no JSON: {said}") from error


def _key(config: HttpConfig) -> dict[str, str]:
    if not config.key_variable:
        return {}
    if config.key_variable not in os.environ:
        raise InputError(
            f"the environment variable {config.key_variable}, which rollout.http.key_variable "
            "names, is not set"
        )
    return {"Authorization": f"Bearer {os.environ[config.key_variable]}"}
