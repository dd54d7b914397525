"""From prompts to a batch of judged groups whose rewards differ (dynamic sampling)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_m1.checkpoint import agreement
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.groups import Group
from megatron_m1.rl.prompts import Prompts
from megatron_m1.rl.recording import Judge, Record, Share, key_of
from megatron_m1.rl.rollout.engine import Request, SamplingParams
from megatron_m1.rl.samples import Prompt, Response, Scored

Draw = Callable[[Sequence[Request]], Iterator[Response]]
"""Responses to the requests, as they finish."""


@dataclass
class Batch:
    """What a step trains on, and what was done for it.

    Attributes:
        groups: to train on, in the order of their prompts.
        window: tokens that its responses may have.
        next_prompt: position of the first prompt that no group was begun for.
        judged: every response that was judged in this step, those left out too, with its prompt.
        without_spread: groups left out since their rewards are all the same.
        paused: responses that go on in the next step.
        drawn: tokens that were generated for it, by this run of the program.
        rollout_seconds, reward_seconds: time spent.
        held_seconds: time that it waited for newer weights before it was begun.
    """

    window: int
    groups: list[Group] = field(default_factory=list)
    next_prompt: int = 0
    judged: list[tuple[Prompt, Scored]] = field(default_factory=list)
    without_spread: int = 0
    paused: int = 0
    drawn: int = 0
    rollout_seconds: float = 0.0
    reward_seconds: float = 0.0
    held_seconds: float = 0.0


class Collector:
    """Fills batches. Every process has one, and all see the same responses and rewards.

    Args:
        draw: collective where ``share`` is.
        share: the default is collective; ``alone`` is for one process that collects by itself.

    Attributes:
        next_prompt: position of the first prompt that no group was begun for.
        waiting: groups that were begun and not trained on, by prompt.
    """

    def __init__(
        self,
        prompts: Prompts,
        tokenizer: Tokenizer,
        draw: Draw,
        judge: Judge,
        config: RLConfig,
        folder: Path,
        fingerprint: str,
        share: Share = agreement.on_first,
    ) -> None:
        self.prompts, self.tokenizer, self.draw, self.judge = prompts, tokenizer, draw, judge
        self.config, self.share = config, share
        self.folder, self.fingerprint = folder, fingerprint
        self.next_prompt = 0
        self.waiting: dict[int, Group] = {}

    def collect(self, step: int, window: int) -> Batch:
        """The batch of the step that follows ``step`` finished ones. Collective where ``share`` is.

        Args:
            window: tokens that a response may have.
        """
        batch = Batch(window)
        with self._record(step + 1) as record:
            for refill in range(self.config.rl.refills):
                self._begin_groups()
                carried = list(self.waiting.values()) if refill == 0 else self._untouched()
                self._generate(carried, record, batch)
                self._judge(record, batch)
                if not self._missing():
                    break
        ready = sorted(group.prompt.id for group in self.waiting.values() if group.scored)
        chosen = ready[: self.config.rl.prompts_per_batch]
        batch.groups = [self.waiting.pop(prompt) for prompt in chosen]
        batch.paused = sum(len(group.unfinished) for group in self.waiting.values())
        batch.next_prompt = self.next_prompt
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the position among the prompts, and groups that are under way."""
        groups = [group.state_dict() for group in self.waiting.values()]
        return {"next_prompt": self.next_prompt, "waiting": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next_prompt = state["next_prompt"]
        self.waiting = {}
        for values in state["waiting"]:
            self._open(values["prompt"]).load_state_dict(values)

    def _record(self, step: int) -> Record:
        return Record(self.folder, step, self.fingerprint, self.judge, self.share)

    def _missing(self) -> int:
        """Groups that the batch lacks."""
        ready = sum(bool(group.scored) for group in self.waiting.values())
        return max(self.config.rl.prompts_per_batch - ready, 0)

    def _begin_groups(self) -> None:
        """Begin so many that the batch is full if none is left out or paused."""
        under_way = len(self._untouched())
        for _ in range(self._missing() - under_way):
            self._open(self.next_prompt)
            self.next_prompt += 1

    def _untouched(self) -> list[Group]:
        return [group for group in self.waiting.values() if not group.responses]

    def _open(self, index: int) -> Group:
        prompt = self.prompts.prompt(index)
        # A model that has seen only whole documents starts an empty prompt where one starts.
        tokens = tuple(self.tokenizer.encode(prompt.text)) or (self.tokenizer.eod,)
        group = Group(prompt, tokens, self.config.rl.group_size)
        self.waiting[index] = group
        return group

    def _generate(self, groups: list[Group], record: Record, batch: Batch) -> None:
        started = time.perf_counter()
        requests = [
            self._request(group, index, batch.window)
            for group in groups
            if not group.scored
            for index in group.unfinished
        ]
        for response in record.completed(requests):
            self._take(response)
        missing = [request for request in requests if key_of(request) not in record.responses]
        before = {
            key_of(request): len(request.begun.tokens) for request in missing if request.begun
        }
        for response in self.draw(missing) if missing else ():
            ended = self._paused_at(response, batch.window)
            record.add_response(self.waiting[ended.prompt_id].prompt, ended)
            self._take(ended)
            batch.drawn += len(ended.tokens) - before.get(key_of(ended), 0)
        batch.rollout_seconds += time.perf_counter() - started

    def _request(self, group: Group, index: int, window: int) -> Request:
        rollout, begun = self.config.rollout, group.responses.get(index)
        most = window
        if rollout.tokens_per_step is not None:
            most = min(window, (len(begun.tokens) if begun else 0) + rollout.tokens_per_step)
        sampling = SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_new_tokens=most,
            stop=tuple(rollout.stop),
            repetition_length=rollout.repetition_length,
            repetition_probability=rollout.repetition_probability,
        )
        return Request(
            group.prompt.id, index, group.tokens, self.config.seed, sampling, begun=begun
        )

    def _paused_at(self, response: Response, window: int) -> Response:
        """A response that has used up the tokens of this step, but not the window, goes on later.

        Where no step has a limit of its own none goes on: a server that tells texts may tell fewer
        tokens than the window that it filled.
        """
        is_limited = self.config.rollout.tokens_per_step is not None
        if is_limited and response.finish == "length" and len(response.tokens) < window:
            return replace(response, finish="paused")
        return response

    def _take(self, response: Response) -> None:
        self.waiting[response.prompt_id].responses[response.index] = response

    def _judge(self, record: Record, batch: Batch) -> None:
        """Judge the groups that are complete, and drop those that teach nothing."""
        started = time.perf_counter()
        complete = [
            group for group in self.waiting.values() if not group.unfinished and not group.scored
        ]
        for group, scored_responses in zip(complete, record.judged(complete), strict=True):
            group.scored = scored_responses
            batch.judged += [(group.prompt, scored) for scored in group.scored]
            if self.config.rl.dynamic_sampling and not group.has_spread:
                batch.without_spread += 1
                del self.waiting[group.prompt.id]
        batch.reward_seconds += time.perf_counter() - started
