"""Rewards of responses: each goes to the verifier of its data source, many at a time."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from megatron_m1.errors import UserError
from megatron_m1.rl.rewards.config import RewardConfig
from megatron_m1.rl.rewards.functions import TOKENS
from megatron_m1.rl.rewards.registry import HERE, PROCESS, Registry, Verifier
from megatron_m1.rl.rewards.slots import Slots, VerifierTimeout
from megatron_m1.rl.rewards.verdict import Verdict, call
from megatron_m1.rl.samples import Prompt, Response, Scored

logger = logging.getLogger(__name__)

TIMEOUT = "timeout"
"""The detail that says that a failure was one of time."""
_MOST_WARNINGS = 20


class Scorer:
    """Judges responses. Used in one process of a run, as a context manager.

    Args:
        decode: the text of a response's tokens, without its stop token.
    """

    def __init__(self, config: RewardConfig, decode: Callable[[list[int]], str]) -> None:
        self._config, self._decode = config, decode
        self._registry = Registry(config)
        self._slots = Slots(config)
        self._threads = ThreadPoolExecutor(config.generative.concurrent, thread_name_prefix="judge")
        self._warned: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._slots.close()
        self._threads.shutdown(cancel_futures=True)

    def prepare(self, data_sources: Iterable[str]) -> None:
        """Find the verifiers before they are needed, and start a sandbox where they need one.

        Raises:
            UserError: a data source has no verifier, or its verifier cannot run here.
        """
        verifiers = [self._registry.verifier(name) for name in dict.fromkeys(data_sources)]
        if any(verifier.use in ("code", "software") for verifier in verifiers):
            self._registry.sandbox()
        for verifier in verifiers:
            if verifier.use in ("grade", "compare"):
                verifier.load()

    def submit(self, prompt: Prompt, response: Response) -> Future[Scored]:
        """The response with its reward, at once where its verifier is trusted to be quick.

        The future raises UserError where the verifier cannot work at all; failures on single
        responses come back as such.
        """
        verifier = self._registry.verifier(prompt.data_source)
        request = self._request(verifier, prompt, response)
        if verifier.place == PROCESS:
            verdict = self._slots.submit(request, self._config.seconds + verifier.seconds)
        else:
            function = self._registry.function(prompt.data_source)
            if verifier.place == HERE:
                verdict = Future()
                _resolve(verdict, lambda: call(function, request))
            else:
                verdict = self._threads.submit(call, function, request)
        return self._scored(verdict, prompt, response)

    def score_all(self, pairs: Sequence[tuple[Prompt, Response]]) -> list[Scored]:
        """The responses with their rewards, in their order."""
        return [future.result() for future in [self.submit(*pair) for pair in pairs]]

    def _request(self, verifier: Verifier, prompt: Prompt, response: Response) -> dict[str, Any]:
        info = {"prompt": prompt.text, **prompt.extra_info}
        if verifier.wants_tokens:
            info[TOKENS] = response.tokens
        return {
            "data_source": prompt.data_source,
            "solution_str": self._decode(response.tokens),
            "ground_truth": prompt.ground_truth,
            "extra_info": info,
        }

    def _scored(
        self, verdict: Future[Verdict], prompt: Prompt, response: Response
    ) -> Future[Scored]:
        scored: Future[Scored] = Future()

        def done(finished: Future[Verdict]) -> None:
            _resolve(scored, lambda: self._judged(finished, prompt, response))

        verdict.add_done_callback(done)
        return scored

    def _judged(self, verdict: Future[Verdict], prompt: Prompt, response: Response) -> Scored:
        try:
            found = verdict.result()
        except UserError:
            raise
        except Exception as error:
            self._warn(f"no reward for a response to {prompt.data_source}: {error}")
            is_late = isinstance(error, VerifierTimeout)
            return Scored(response, 0.0, {TIMEOUT: 1.0} if is_late else {}, failed=True)
        bonus = self._config.format_bonus * found.details.get("format", 0.0)
        return Scored(response, found.score + bonus, found.details)

    def _warn(self, text: str) -> None:
        """Say it once, and no more than a screenful in a run: the metrics count the rest."""
        if text not in self._warned and len(self._warned) < _MOST_WARNINGS:
            self._warned.add(text)
            logger.warning("%s", text)


def _resolve(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def reward_metrics(data_sources: Sequence[str], scored: Sequence[Scored]) -> dict[str, float]:
    """Failures, and the means of rewards and details by data source; failures are in no mean.

    Args:
        data_sources: of the prompts, one for each response.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for data_source, one in zip(data_sources, scored, strict=True):
        if not one.failed:
            for name, value in {"score": one.reward, **one.details}.items():
                values[f"reward/{data_source}/{name}"].append(value)
    return {
        "reward/failed": float(sum(one.failed for one in scored)),
        "reward/timeouts": float(sum(one.failed and TIMEOUT in one.details for one in scored)),
        **{name: sum(found) / len(found) for name, found in values.items()},
    }
