"""Questions to a model behind an OpenAI-compatible server, within a time limit."""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

import httpx

from megatron_m1.errors import InputError
from megatron_m1.rl.rewards.config import GenerativeConfig
from megatron_m1.rl.rewards.verdict import VerifierFailed

_FIRST_PAUSE = 0.5  # seconds; doubled after each failure
_LONGEST_PAUSE = 20.0
_MOST_BYTES = 4 << 20
_WORTH_ANOTHER_TRY = (408, 409, 425, 429)


class _Passing(Exception):
    """A failure that another try may not have."""


class Chat:
    """One server; several threads may ask at a time.

    Raises:
        InputError: no server is configured, or its key is missing.
    """

    def __init__(self, config: GenerativeConfig) -> None:
        if not config.url:
            raise InputError(
                "reward.generative.url is missing: give the address of an OpenAI-compatible server "
                "up to /v1"
            )
        self._config = config
        headers = {}
        if config.key_variable:
            if config.key_variable not in os.environ:
                raise InputError(
                    f"the environment variable {config.key_variable}, which "
                    "reward.generative.key_variable names, is not set"
                )
            headers["Authorization"] = f"Bearer {os.environ[config.key_variable]}"
        self._client = httpx.Client(headers=headers, limits=httpx.Limits(max_connections=None))

    def ask(self, question: str) -> str:
        """The answer to a question.

        Raises:
            VerifierFailed: there was none in time.
        """
        end = time.monotonic() + self._config.seconds
        attempt = 0
        while True:
            try:
                return self._try(question, end)
            except (_Passing, httpx.TransportError) as error:
                # Some of the pause is chance, so that many threads do not come back at once.
                pause = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
                if attempt == self._config.retries or time.monotonic() + pause >= end:
                    raise VerifierFailed(f"{self._config.url} did not answer: {error!r}") from error
            time.sleep(pause)
            attempt += 1

    def _try(self, question: str, end: float) -> str:
        body = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": self._config.temperature,
            "max_tokens": self._config.max_tokens,
        }
        url = f"{(self._config.url or '').rstrip('/')}/chat/completions"
        left = max(end - time.monotonic(), 0.001)
        with self._client.stream("POST", url, json=body, timeout=left) as response:
            data = _read(response, end)
            if response.status_code >= 500 or response.status_code in _WORTH_ANOTHER_TRY:
                raise _Passing(f"status {response.status_code}: {data[:200]!r}")
            if response.status_code != 200:
                raise VerifierFailed(
                    f"{url} answered with status {response.status_code}: {data[:200]!r}"
                )
            return _content(data)


def _read(response: httpx.Response, end: float) -> bytes:
    """The body, however slowly it comes: httpx limits the time of each read, not of all."""
    data = bytearray()
    for chunk in response.iter_bytes():
        data += chunk
        if time.monotonic() > end:
            raise _Passing("the answer took too long")
        if len(data) > _MOST_BYTES:
            raise _Passing(f"the answer has more than {_MOST_BYTES} bytes")
    return bytes(data)


def _content(data: bytes) -> str:
    try:
        answer: Any = json.loads(data)
        content = answer["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise _Passing(f"the answer is no chat completion: {data[:200]!r}") from error
    if not isinstance(content, str):
        raise _Passing(f"the answer holds no text: {data[:200]!r}")
    return content
