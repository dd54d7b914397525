"""How long responses may be, in stages: MiniMax-M1 (arXiv 2506.13585, section 5) lets its output
grow from 40K to 80K tokens, and moves on when the perplexity of what is generated has converged and
the 99th percentile of its length nears the window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class WindowsConfig:
    """The stages and what moves a run from one to the next.

    Attributes:
        stages: rising output lengths, the first of which ``rollout.max_new_tokens`` gives way to;
            empty keeps that.
        stretch: steps over which perplexity and length are averaged.
        perplexity_change: converged is a relative change below this between two stretches.
        length_share: near is a 99th percentile above this share of the window.
    """

    stages: list[int] = field(default_factory=list)
    stretch: int = 20
    perplexity_change: float = 0.02
    length_share: float = 0.9

    def problems(self) -> list[str]:
        found = []
        if self.stages != sorted(set(self.stages)) or any(stage < 1 for stage in self.stages):
            found.append(f"rl.windows.stages={self.stages} must rise and be positive")
        if self.stretch < 1:
            found.append(f"rl.windows.stretch={self.stretch} must be at least 1")
        if self.perplexity_change <= 0:
            found.append(f"rl.windows.perplexity_change={self.perplexity_change} must be positive")
        if not 0 < self.length_share <= 1:
            found.append(f"rl.windows.length_share={self.length_share} must be in (0, 1]")
        return found


class Windows:
    """Which stage a run is in. Pure: what it does follows from what it was shown."""

    def __init__(self, config: WindowsConfig, fixed: int) -> None:
        self._config = config
        self._stages = config.stages or [fixed]
        self.stage = 0
        self._perplexities: list[float] = []
        self._lengths: list[float] = []

    @property
    def tokens(self) -> int:
        """Tokens that a response may have."""
        return self._stages[self.stage]

    def observe(self, perplexity: float, length_p99: float) -> bool:
        """Take in a step; says whether the next one is in a new stage."""
        self._perplexities.append(perplexity)
        self._lengths.append(length_p99)
        del self._perplexities[: -2 * self._config.stretch]
        del self._lengths[: -self._config.stretch]
        if self.stage + 1 == len(self._stages) or not (self._has_converged() and self._is_near()):
            return False
        self.stage += 1
        self._perplexities, self._lengths = [], []
        return True

    def _has_converged(self) -> bool:
        stretch = self._config.stretch
        if len(self._perplexities) < 2 * stretch:
            return False
        before, after = _mean(self._perplexities[:stretch]), _mean(self._perplexities[stretch:])
        return abs(after / before - 1) < self._config.perplexity_change

    def _is_near(self) -> bool:
        return _mean(self._lengths) >= self._config.length_share * self.tokens

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "perplexities": list(self._perplexities),
            "lengths": list(self._lengths),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved stage, or where that is gone, to the longest that is no longer."""
        reached = [i for i, tokens in enumerate(self._stages) if tokens <= state["tokens"]]
        self.stage = max(reached, default=0)
        self._perplexities = list(state["perplexities"])
        self._lengths = list(state["lengths"])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
