"""What was paid for in a step, by this run of the program or one before: responses, rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron_m1.errors import StorageError
from megatron_m1.rl.groups import Group, reward_values, with_reward
from megatron_m1.rl.journal import Journal, Key
from megatron_m1.rl.rollout.engine import Request
from megatron_m1.rl.samples import Prompt, Response, Scored

T = TypeVar("T")

Judge = Callable[[Prompt, Response], Future[Scored]]
"""Begins to judge a response; asked on the first process only, as soon as the response ends."""


class Share(Protocol):
    """Does what only the first process can, and gives its result to all that collect."""

    def __call__(self, action: Callable[[], T]) -> T: ...


def alone(action: Callable[[], T]) -> T:
    """What ``Share`` is for one process that collects by itself."""
    return action()


class Record:
    """A step's journal and its verdicts: the first process has the file and the verifiers, all know
    what the file held."""

    def __init__(
        self, folder: Path, step: int, fingerprint: str, judge: Judge, share: Share
    ) -> None:
        self._folder = folder
        self._journal: Journal | None = None
        self._judge, self._share = judge, share
        self._verdicts: dict[Key, Future[Scored]] = {}

        def opened() -> tuple[dict[Key, Response], dict[Key, dict[str, Any]]]:
            with self._writing():
                self._journal = Journal(folder, step, fingerprint)
            return self._journal.responses, self._journal.rewards

        self.responses, self._rewards = share(opened)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        if self._journal:
            with self._writing():
                self._journal.close()

    def completed(self, requests: Sequence[Request]) -> Iterator[Response]:
        """Responses to the requests that an interrupted run has paid for."""
        return (
            self.responses[key_of(request)]
            for request in requests
            if key_of(request) in self.responses
        )

    def add_response(self, prompt: Prompt, response: Response) -> None:
        """Keep a response; its verifier works while others are drawn.

        Raises:
            StorageError: the disk does not take it.
        """
        if self._journal:
            with self._writing():
                self._journal.add_response(response)
            self._begin_to_judge(prompt, response)

    def judged(self, groups: Sequence[Group]) -> list[list[Scored]]:
        """The groups' responses with their rewards."""
        missing = [
            (group.prompt, response)
            for group in groups
            for response in group.in_order
            if key_of(response) not in self._rewards
        ]
        if missing:
            self._rewards |= self._share(lambda: self._rewards_of(missing))
        return [
            [with_reward(response, self._rewards[key_of(response)]) for response in group.in_order]
            for group in groups
        ]

    def _begin_to_judge(self, prompt: Prompt, response: Response) -> None:
        key = key_of(response)
        if response.finish != "paused" and key not in self._verdicts:
            self._verdicts[key] = self._judge(prompt, response)

    def _rewards_of(self, pairs: Sequence[tuple[Prompt, Response]]) -> dict[Key, dict[str, Any]]:
        """Rewards as plain values, kept as soon as they are known."""
        assert self._journal is not None
        for prompt, response in pairs:
            # Of responses that an earlier run has paid for.
            self._begin_to_judge(prompt, response)
        keys = {self._verdicts.pop(key_of(response)): key_of(response) for _, response in pairs}
        rewards = {}
        for verdict in as_completed(keys):
            rewards[keys[verdict]] = reward_values(verdict.result())
            with self._writing():
                self._journal.add_reward(keys[verdict], rewards[keys[verdict]])
        return rewards

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"responses cannot be kept in {self._folder}: {error}") from error


def key_of(one: Request | Response) -> Key:
    return one.prompt_id, one.index
