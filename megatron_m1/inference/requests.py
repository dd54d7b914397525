"""What a generation is asked for and what it gives: plain data, no tensor but the experts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

FINISHES = ("stop", "length", "repetition", "paused")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when a response ends.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: draw from the fewest tokens whose probabilities reach this sum.
        top_k: draw from this many of the most likely tokens; 0 from all.
        max_new_tokens: of the whole response, over its pauses.
        stop: texts that end a response where one is complete; it stays in the response.
        repetition_length: end a response after this many tokens in a row whose probability under
            the model itself is above ``repetition_probability``; 0 never (MiniMax-M1, arXiv
            2506.13585, section 5.2, takes 3,000 and 0.99).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()
    repetition_length: int = 0
    repetition_probability: float = 0.99

    def problems(self, name: str = "sampling") -> list[str]:
        """What cannot be sampled with, one sentence each, keys named below ``name``."""
        found = []
        if self.temperature < 0:
            found.append(f"{name}.temperature={self.temperature} must not be negative")
        if not 0 < self.top_p <= 1:
            found.append(f"{name}.top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k < 0:
            found.append(f"{name}.top_k={self.top_k} must not be negative: 0 samples from all")
        if self.max_new_tokens < 1:
            found.append(f"{name}.max_new_tokens={self.max_new_tokens} must be at least 1")
        if "" in self.stop:
            found.append(f"{name}.stop={list(self.stop)} holds an empty text, which ends nothing")
        if self.repetition_length < 0:
            found.append(
                f"{name}.repetition_length={self.repetition_length} must not be negative: 0 never "
                "ends a response"
            )
        if not 0 < self.repetition_probability < 1:
            found.append(
                f"{name}.repetition_probability={self.repetition_probability} must be between 0 "
                "and 1"
            )
        return found


@dataclass
class Continuation:
    """What was generated after a prompt, so far.

    Attributes:
        tokens: with the stop token if one was drawn.
        logprobs: of the distribution that was sampled from.
        raw_logprobs: of the model's own distribution, at temperature 1.
        versions: of the weights that drew each token.
        finish: one of ``FINISHES``.
        experts: [prompt + response - 1, MoE layers, topk] int16, where they are recorded.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: str = "paused"
    experts: Tensor | None = None


@dataclass(frozen=True)
class Sequence:
    """A response that is wanted, or one that is to go on.

    Attributes:
        prompt: its tokens, at least one.
        sampling: how it is drawn.
        seed, prompt_id, index: what its draws depend on, beside the position; the last two also
            name it among those that were paused.
        begun: what there is of it.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int = 0
    prompt_id: int = 0
    index: int = 0
    begun: Continuation | None = None

    @property
    def tokens(self) -> list[int]:
        """Of prompt and response, so far."""
        return [*self.prompt, *(self.begun.tokens if self.begun else ())]
