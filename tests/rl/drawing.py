"""An engine without a model: draws follow from the request, as they do in every engine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from megatron_m1.rl.rollout.engine import Request
from megatron_m1.rl.samples import Prompt, Response, Scored

STOP = 0


class DrawingEngine:
    """Responses of 1 to 40 tokens below 50, ended by token 0, or earlier by the request.

    Attributes:
        asked: keys of every request so far.
    """

    def __init__(self) -> None:
        self.version = 0
        self.asked: list[tuple[int, int]] = []

    def generate(
        self, requests: Sequence[Request], *, stop_after: int | None = None
    ) -> Iterator[Response]:
        for request in requests:
            self.asked.append((request.prompt_id, request.index))
            yield self._respond(request)

    def weights_changed(self, version: int) -> None:
        self.version = version

    def _respond(self, request: Request) -> Response:
        begun = request.begun
        tokens = list(begun.tokens) if begun else []
        versions = list(begun.versions) if begun else []
        while len(tokens) < request.sampling.max_new_tokens and tokens[-1:] != [STOP]:
            tokens.append(draw(request, len(tokens)))
            versions.append(self.version)
        finish = "stop" if tokens[-1] == STOP else "length"
        logprobs = [-1 / (token + 1) for token in tokens]
        return Response(
            request.prompt_id, request.index, tokens, logprobs, logprobs, versions, finish
        )


def draw(request: Request, position: int) -> int:
    place = (request.seed, request.prompt_id, request.index, position)
    chance = random.Random(repr(place))
    return STOP if chance.random() < 0.1 else chance.randrange(1, 50)


class Numbers:
    """Prompts that are their own numbers."""

    fingerprint = "numbers"
    data_sources = {"numbers"}

    def prompt(self, index: int) -> Prompt:
        return Prompt(index, "numbers", str(index), None)


def judge(prompt: Prompt, response: Response) -> Future[Scored]:
    """1 for an odd sum; every third prompt is too easy, and nobody can judge a sum of 13 x n."""
    total = sum(response.tokens)
    reward = 1.0 if prompt.id % 3 == 0 else float(total % 2)
    verdict: Future[Scored] = Future()
    verdict.set_result(Scored(response, reward, {"sum": float(total)}, failed=total % 13 == 0))
    return verdict
