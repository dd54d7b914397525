"""A prompt with its responses, some of which may be under way or not judged yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_m1.rl.journal import decode, encode
from megatron_m1.rl.samples import Prompt, Response, Scored
from megatron_m1.rl.shaping import has_spread


@dataclass
class Group:
    """The responses to a prompt.

    Attributes:
        tokens: the prompt's.
        responses: by index; a paused one goes on in the next step.
        scored: in the order of their indices, once all have ended.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    size: int
    responses: dict[int, Response] = field(default_factory=dict)
    scored: list[Scored] = field(default_factory=list)

    @property
    def unfinished(self) -> list[int]:
        """Indices of the responses that have not ended."""
        return [
            index
            for index in range(self.size)
            if index not in self.responses or self.responses[index].finish == "paused"
        ]

    @property
    def in_order(self) -> list[Response]:
        return [self.responses[index] for index in sorted(self.responses)]

    @property
    def has_spread(self) -> bool:
        """Whether the rewards of those that could be judged differ: else no advantage does."""
        return has_spread(self.scored)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "prompt": self.prompt.id,
            "responses": [encode(response) for response in self.in_order],
            "rewards": [reward_values(scored) for scored in self.scored],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        responses = [decode(values) for values in state["responses"]]
        self.responses = {response.index: response for response in responses}
        self.scored = [
            with_reward(response, values)
            for response, values in zip(self.in_order, state["rewards"], strict=False)
        ]


def reward_values(scored: Scored) -> dict[str, Any]:
    """A reward as plain values."""
    return {"reward": scored.reward, "details": scored.details, "failed": scored.failed}


def with_reward(response: Response, values: dict[str, Any]) -> Scored:
    return Scored(response, values["reward"], values["details"], values["failed"])


def parts(groups: Sequence[Group], count: int) -> list[list[Group]]:
    """The groups in ``count`` parts that differ by one at most; fewer parts for fewer groups."""
    count = min(count, len(groups))
    bounds = [len(groups) * i // count for i in range(count + 1)] if count else [0]
    return [list(groups[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
