"""The requests of one rollout on their way to servers and back, in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.rl.rollout.client import Client, Counts, Rejected, Send, ServerError
from megatron_m1.rl.rollout.config import HttpConfig
from megatron_m1.rl.rollout.engine import Request
from megatron_m1.rl.rollout.servers import (
    ENDS,
    Completion,
    Published,
    body,
    completion,
    tag,
)
from megatron_m1.rl.samples import Response

_SECONDS = 0.2  # between looks for `stop`


class Asking:
    """Asks for all that is wanted, so many at a time.

    Args:
        weights: those that what is begun now is to be of.
        stop_after: give the others as they stand once so many have ended.
        counts: of ``tokens`` drawn, ``tokens_without_logprobs``, ``stale`` answers of other
            weights, and ``encoded_otherwise``, responses whose tokens are those of their text and
            not those that were drawn.
    """

    def __init__(
        self,
        config: HttpConfig,
        tokenizer: Tokenizer,
        weights: Callable[[], Published],
        counts: Counts,
        requests: Sequence[Request],
        stop_after: int | None = None,
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._weights, self._counts = weights, counts
        self._waiting = dict(enumerate(requests))
        self._enough = len(requests) if stop_after is None else stop_after
        self._client = Client(config, counts)
        self._pool = ThreadPoolExecutor(config.concurrency, thread_name_prefix="rollout")
        self._asked: dict[Future[Response], int] = {}
        self._failure: ServerError | None = None
        self._is_begun = False
        self._is_stopped = False

    def take(self, seconds: float) -> list[Response] | None:
        """What has ended within some seconds; None after the last.

        Raises:
            ServerError: a request failed. It comes last: what others have brought is given before.
        """
        if not self._is_begun:
            return self._begin()
        if self._is_stopped or self._failure:
            self._asked = {f: number for f, number in self._asked.items() if not f.cancel()}
        if self._failure and not self._asked:
            raise self._failure
        if self._enough <= 0 or not self._asked:
            return self._paused() if self._waiting and not self._is_stopped else None
        return self._ended(seconds)

    def every(self) -> Iterator[Response]:
        """All of them, as they end."""
        try:
            while (some := self.take(_SECONDS)) is not None:
                yield from some
        finally:
            self.close()

    def stop(self) -> None:
        """From any thread: send nothing more. What is under way is waited for."""
        self._is_stopped = True

    def close(self) -> None:
        """Give up what is still asked for."""
        self._client.given_up.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _begin(self) -> list[Response]:
        """Ask; those that need nothing more have ended."""
        self._is_begun = True
        full = [
            (number, replace(request.begun, finish="length"))
            for number, request in self._waiting.items()
            if request.begun and len(request.begun.tokens) >= request.sampling.max_new_tokens
        ]
        ended = [self._finished(number, response) for number, response in full[: self._enough]]
        if self._enough > 0 and not self._is_stopped:
            self._asked = {
                self._pool.submit(self._ask, request): number
                for number, request in self._waiting.items()
            }
        return ended

    def _ended(self, seconds: float) -> list[Response]:
        found = []
        for future in wait(self._asked, seconds, FIRST_COMPLETED).done:
            number = self._asked.pop(future)
            try:
                found.append((number, future.result()))
            except ServerError as error:
                # What servers are working on is paid for, but nothing is asked for again.
                self._failure = self._failure or error
                self._client.given_up.set()
        return [self._finished(number, response) for number, response in found[: self._enough]]

    def _finished(self, number: int, response: Response) -> Response:
        del self._waiting[number]
        self._enough -= 1
        return response

    def _paused(self) -> list[Response]:
        """What there is of the others."""
        waiting, self._waiting = self._waiting, {}
        return [replace(_begun(request), finish="paused") for request in waiting.values()]

    def _ask(self, request: Request) -> Response:
        drawn, version = self._client.post(
            "/v1/completions", lambda send: self._attempt(request, send)
        )
        begun = _begun(request)
        response = replace(
            begun,
            tokens=[*begun.tokens, *drawn.tokens],
            logprobs=[*begun.logprobs, *drawn.sampled],
            raw_logprobs=[*begun.raw_logprobs, *drawn.raw],
            versions=[*begun.versions, *[version] * len(drawn.tokens)],
            finish=drawn.finish,
            experts=None,
        )
        self._counts.add(
            tokens=len(drawn.tokens),
            tokens_without_logprobs=sum(map(math.isnan, drawn.raw)),
            encoded_otherwise=drawn.encoded_otherwise,
        )
        return _cut_repetition(response, request)

    def _attempt(self, request: Request, send: Send) -> tuple[Completion, int]:
        # An attempt after new weights were given asks for those.
        weights = self._weights()
        answer = send(body(self._config, weights, request, self._tokenizer))
        drawn = self._completion(answer, request)
        if drawn.finish not in ENDS:
            raise Rejected(f"it gave a response up, finish_reason={drawn.finish}")
        wanted = tag(self._config, weights)
        if drawn.weights != wanted:
            self._counts.add(stale=1)
            raise Rejected(f"it answers with the weights {drawn.weights}, not {wanted}")
        return drawn, weights.version

    def _completion(self, answer: Any, request: Request) -> Completion:
        try:
            return completion(self._config, answer, request, self._tokenizer)
        except ValueError as error:
            raise ServerError(
                "a server of rollout.http.urls answers like no server of "
                f"rollout.http.server={self._config.server}: {error}"
            ) from error


def _begun(request: Request) -> Response:
    return request.begun or Response(request.prompt_id, request.index, [], [], [], [], "paused")


def _cut_repetition(response: Response, request: Request) -> Response:
    """A server may go on where our own engine ends a response: the rest is dropped."""
    length = request.sampling.repetition_length
    threshold = math.log(request.sampling.repetition_probability)
    streak = 0
    for number, logprob in enumerate(response.raw_logprobs, 1):
        streak = streak + 1 if logprob > threshold else 0
        is_stop = number == len(response.tokens) and response.finish == "stop"
        if length and streak >= length and not is_stop:
            fields = ("tokens", "logprobs", "raw_logprobs", "versions")
            kept = {name: getattr(response, name)[:number] for name in fields}
            return replace(response, **kept, finish="repetition")
    return response
