"""Rollout by an OpenAI-compatible server that has a copy of the policy's weights.

The server is told which weights by the name of its model: each policy version is published under a
name of its own, every answer says which model it is of, and one of another is not taken.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice

import httpx

from megatron_m1.checkpoint import agreement
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.errors import UserError
from megatron_m1.rl.rollout.engine import Request
from megatron_m1.rl.rollout.servers import SERVERS, Completion, body, completion
from megatron_m1.rl.samples import Response

Publish = Callable[[int], str]
"""Gives the server the weights of a policy version; returns the name of its model from then on."""


class ServerError(UserError):
    """A server that does not answer, or not as such servers do."""

    exit_code = 69


@dataclass(frozen=True)
class ServerOptions:
    """How a server is used.

    Attributes:
        url: ``http://HOST:PORT``, without ``/v1``.
        server: one of ``servers.SERVERS``.
        concurrency: requests at a time.
        timeout: seconds that one answer may take; loading new weights may be part of it.
        attempts: how often a request is sent before the run ends.
        backoff: seconds before the second attempt, twice as many before each further one.
        logprobs_are: what the server tells: ``raw``, of the model at temperature 1, as vLLM does,
            or ``sampled``, of the distribution that it draws from.
    """

    url: str
    server: str = "vllm"
    concurrency: int = 64
    timeout: float = 600.0
    attempts: int = 5
    backoff: float = 1.0
    logprobs_are: str = "raw"

    def problems(self, name: str = "rollout") -> list[str]:
        """What cannot work, one sentence each, keys named below ``name``."""
        found = []
        if not self.url.startswith(("http://", "https://")):
            found.append(f"{name}.url={self.url} must begin with http:// or https://")
        if self.server not in SERVERS:
            found.append(f"{name}.server={self.server} is not one of {', '.join(SERVERS)}")
        if self.logprobs_are not in ("raw", "sampled"):
            found.append(f"{name}.logprobs_are={self.logprobs_are} is not one of raw, sampled")
        for key in ("concurrency", "attempts"):
            if getattr(self, key) < 1:
                found.append(f"{name}.{key}={getattr(self, key)} must be at least 1")
        if self.timeout <= 0:
            found.append(f"{name}.timeout={self.timeout} must be positive")
        return found


class HttpEngine:
    """Asks a server, from the first process; all others are told.

    Attributes:
        version: policy version that the server has.
        counts: since they were last taken: ``tokens`` drawn, ``tokens_without_logprobs``,
            ``retries``, ``stale`` answers of other weights, ``encoded_otherwise``: responses whose
            tokens are those of their text and not those that were drawn.
    """

    def __init__(
        self, options: ServerOptions, tokenizer: Tokenizer, publish: Publish, version: int = 0
    ) -> None:
        self._options, self._tokenizer, self._publish = options, tokenizer, publish
        self.counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._give(version)

    def generate(
        self, requests: Sequence[Request], *, stop_after: int | None = None
    ) -> Iterator[Response]:
        """See ``Engine``. A server keeps no state of what is paused, and tells no part of it."""
        # Only the first process takes from it.
        responses = self._responses(requests, stop_after)
        while (response := agreement.on_first(lambda: next(responses, None))) is not None:
            yield response

    def weights_changed(self, version: int) -> None:
        self._give(version)

    def take_counts(self) -> dict[str, int]:
        """``counts``, which then start again from nothing. Of the first process."""
        with self._counting:
            counts, self.counts = dict(self.counts), Counter()
        return counts

    def _count(self, **more: int) -> None:
        with self._counting:
            self.counts.update(more)

    def _give(self, version: int) -> None:
        self._model = agreement.on_first(lambda: self._publish(version))
        self.version = version

    def _responses(self, requests: Sequence[Request], stop_after: int | None) -> Iterator[Response]:
        waiting = dict(enumerate(requests))
        for number, request in list(waiting.items()):
            begun = request.begun
            if begun and len(begun.tokens) >= request.sampling.max_new_tokens:
                del waiting[number]
                yield replace(begun, finish="length")
        left = len(waiting) if stop_after is None else stop_after - (len(requests) - len(waiting))
        finished = self._finished(waiting) if left > 0 else iter(())
        for number, response in islice(finished, left):
            del waiting[number]
            yield response
        for request in waiting.values():
            empty = Response(request.prompt_id, request.index, [], [], [], [], "paused")
            yield replace(request.begun or empty, finish="paused")

    def _finished(self, requests: dict[int, Request]) -> Iterator[tuple[int, Response]]:
        """Responses as the server gives them; what is still asked for at the end is given up."""
        options = self._options
        pool = ThreadPoolExecutor(options.concurrency, thread_name_prefix="rollout")
        with httpx.Client(base_url=options.url, timeout=options.timeout) as client:
            asked: dict[Future[Response], int] = {
                pool.submit(self._ask, client, request): number
                for number, request in requests.items()
            }
            try:
                while asked:
                    for future in wait(asked, return_when=FIRST_COMPLETED).done:
                        yield asked.pop(future), future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, client: httpx.Client, request: Request) -> Response:
        asked = body(self._options.server, self._model, request, self._tokenizer)
        for attempt in range(self._options.attempts):
            if attempt:
                self._count(retries=1)
                time.sleep(self._options.backoff * 2 ** (attempt - 1))
            try:
                answer = client.post("/v1/completions", json=asked)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}".strip()
                continue
            if answer.status_code == 429 or answer.status_code >= 500:
                problem = f"status {answer.status_code}: {answer.text[:200]}"
                continue
            if answer.status_code != 200:
                raise ServerError(
                    f"rollout.url={self._options.url} refuses a request, status "
                    f"{answer.status_code}: {answer.text[:200]}"
                )
            try:
                drawn = completion(self._options.server, answer.json(), request, self._tokenizer)
            except ValueError as error:
                raise ServerError(
                    f"rollout.url={self._options.url} answers like no server of "
                    f"rollout.server={self._options.server}: {error}"
                ) from error
            # transformers adds the revision, after an @.
            if drawn.model.split("@")[0] == self._model:
                return self._response(request, drawn)
            self._count(stale=1)
            problem = f"it answers with model {drawn.model}, not {self._model}"
        raise ServerError(
            f"rollout.url={self._options.url} has not answered {self._options.attempts} times; "
            f"the last time: {problem}"
        )

    def _response(self, request: Request, drawn: Completion) -> Response:
        sampling = request.sampling
        begun = request.begun or Response(request.prompt_id, request.index, [], [], [], [], "")
        raw, sampled = self._both(request, drawn.logprobs)
        response = replace(
            begun,
            tokens=[*begun.tokens, *drawn.tokens],
            logprobs=[*begun.logprobs, *sampled],
            raw_logprobs=[*begun.raw_logprobs, *raw],
            versions=[*begun.versions, *[self.version] * len(drawn.tokens)],
            finish="stop" if drawn.stopped else "length",
            experts=None,
        )
        self._count(
            tokens=len(drawn.tokens),
            tokens_without_logprobs=sum(map(math.isnan, raw)),
            encoded_otherwise=drawn.encoded_otherwise,
        )
        if sampling.repetition_length:
            return _cut_repetition(response, request)
        return response

    def _both(self, request: Request, told: list[float]) -> tuple[list[float], list[float]]:
        """Raw log-probabilities and those of the distribution sampled from, NaN where unknown."""
        sampling = request.sampling
        if (sampling.temperature, sampling.top_p, sampling.top_k) == (1, 1, 0):
            return told, told
        unknown = [math.nan] * len(told)
        return (told, unknown) if self._options.logprobs_are == "raw" else (unknown, told)


def _cut_repetition(response: Response, request: Request) -> Response:
    """A server goes on where our own engine ends a response: the rest is dropped."""
    threshold = math.log(request.sampling.repetition_probability)
    streak = 0
    for number, logprob in enumerate(response.raw_logprobs, 1):
        streak = streak + 1 if logprob > threshold else 0
        if streak == request.sampling.repetition_length and number < len(response.tokens):
            fields = ("tokens", "logprobs", "raw_logprobs", "versions")
            kept = {name: getattr(response, name)[:number] for name in fields}
            return replace(response, **kept, finish="repetition")
    return response
