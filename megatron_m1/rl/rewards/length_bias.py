"""Whether a generative reward pays for length: MiniMax-M1 (arXiv 2506.13585, section 4.2) watches
this during training, and mends the judge as soon as responses grow and the task does not gain.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_m1.rl.rewards.config import LengthBiasConfig


@dataclass(frozen=True)
class _Step:
    """Sums over a step's responses of deviations from the means of their prompts, and its means."""

    rewards_squared: float
    lengths_squared: float
    products: float
    length: float
    task_score: float


class LengthBias:
    """Looks at the last steps. Pure: what it says follows from what it was shown."""

    def __init__(self, config: LengthBiasConfig) -> None:
        self._config = config
        self._steps: deque[_Step] = deque(maxlen=config.window)

    def observe(
        self,
        rewards: Sequence[float],
        lengths: Sequence[float],
        prompts: Sequence[Hashable],
        task_score: float,
    ) -> dict[str, float]:
        """Take in a step; gives its metrics.

        Args:
            rewards, lengths: of the responses that the generative reward judged.
            prompts: which prompt each belongs to. Reward and length are compared within a prompt,
                as advantages are: a harder prompt has longer responses without any bias.
            task_score: of the step, by a measure that length cannot please, such as the mean reward
                of verified prompts, or the last evaluation.
        """
        if not len(rewards) == len(lengths) == len(prompts):
            raise ValueError(
                f"{len(rewards)} rewards, {len(lengths)} lengths and {len(prompts)} prompts: give "
                "one of each for a response"
            )
        if rewards:
            self._steps.append(_summed(rewards, lengths, prompts, task_score))
        correlation, growth, gain = self._correlation(), self._growth(), self._gain()
        is_suspect = (
            len(self._steps) == self._config.window
            and growth > self._config.growth
            and gain <= self._config.gain
            and correlation >= self._config.correlation
        )
        return {
            "reward/length_correlation": correlation,
            "reward/length_growth": growth,
            "reward/length_alarm": float(is_suspect),
        }

    def _correlation(self) -> float:
        """Pearson's, over all responses of the window; 0 where one of the two does not vary."""
        spread = math.sqrt(
            sum(step.rewards_squared for step in self._steps)
            * sum(step.lengths_squared for step in self._steps)
        )
        return sum(step.products for step in self._steps) / spread if spread else 0.0

    def _growth(self) -> float:
        """Relative, of the mean length from the first half of the window to the second."""
        first, second = self._halves([step.length for step in self._steps])
        return second / first - 1 if first else 0.0

    def _gain(self) -> float:
        first, second = self._halves([step.task_score for step in self._steps])
        return second - first

    def _halves(self, values: list[float]) -> tuple[float, float]:
        half = len(values) // 2
        return _mean(values[:half]), _mean(values[len(values) - half :])

    def state_dict(self) -> dict[str, Any]:
        return {"steps": [asdict(step) for step in self._steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps.clear()
        self._steps.extend(_Step(**step) for step in state["steps"])


def _summed(
    rewards: Sequence[float],
    lengths: Sequence[float],
    prompts: Sequence[Hashable],
    task_score: float,
) -> _Step:
    groups: dict[Hashable, list[tuple[float, float]]] = defaultdict(list)
    for reward, length, prompt in zip(rewards, lengths, prompts, strict=True):
        groups[prompt].append((reward, length))
    deviations = [pair for group in groups.values() for pair in _deviations(group)]
    return _Step(
        rewards_squared=sum(reward**2 for reward, _ in deviations),
        lengths_squared=sum(length**2 for _, length in deviations),
        products=sum(reward * length for reward, length in deviations),
        length=_mean(list(lengths)),
        task_score=task_score,
    )


def _deviations(group: list[tuple[float, float]]) -> list[tuple[float, float]]:
    reward, length = (_mean(list(values)) for values in zip(*group, strict=True))
    return [(ours - reward, theirs - length) for ours, theirs in group]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
