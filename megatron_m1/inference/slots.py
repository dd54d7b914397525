"""Who has which slot, and how far each sequence is: one account that every process keeps alike.

Data-parallel ranks have slots of their own; every process knows of all of them, since all see the
tokens that were drawn. So what comes next is agreed without a message.

Shapes: R data-parallel ranks with P slots each, N = R * P; M places of a slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.inference import draws
from megatron_m1.inference.requests import Continuation, Sequence

FREE = -1
Ints = NDArray[np.int64]


class Slots:
    """The account. Slot n belongs to data-parallel rank n // P.

    Attributes:
        owner: [N] number of the sequence that has the slot, or ``FREE``.
        tokens: [N, M] of prompt and response.
        prompt: [N] tokens of the prompt.
        known: [N] tokens of prompt and response that there are.
        read: [N] tokens that the cache has taken in.
    """

    def __init__(
        self,
        ranks: int,
        slots: int,
        places: int,
        stop_token: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        count = ranks * slots
        self.ranks, self.per_rank = ranks, slots
        self.stop_token, self._tokenizer = stop_token, tokenizer
        self.owner = np.full(count, FREE)
        self.tokens = np.zeros((count, places), dtype=np.int64)
        self.logprobs = np.zeros((2, count, places))
        self.prompt, self.known, self.read = np.zeros((3, count), dtype=np.int64)
        self._limit, self._since, self.top_k = np.zeros((3, count), dtype=np.int64)
        self.streams = np.zeros(count, dtype=np.uint64)
        self.temperature, self.top_p = np.ones((2, count))
        self._streak, self._streak_limit = np.zeros((2, count), dtype=np.int64)
        self._sure = np.zeros(count)
        self._texts: dict[int, StopTexts] = {}
        self._taken = 0

    @property
    def busy(self) -> Ints:
        """The slots that are taken."""
        return np.flatnonzero(self.owner != FREE)

    def free(self, rank: int | None = None) -> int | None:
        """The first free slot of a rank, or of the rank that has most of them."""
        free_RP = self.owner.reshape(self.ranks, self.per_rank) == FREE
        chosen = int(free_RP.sum(axis=1).argmax()) if rank is None else rank
        if not free_RP[chosen].any():
            return None
        return chosen * self.per_rank + int(free_RP[chosen].argmax())

    def take(self, slot: int, number: int, sequence: Sequence, read: int = 0) -> None:
        """Give a slot to a sequence, of which ``read`` tokens are in the cache."""
        tokens, sampling, begun = sequence.tokens, sequence.sampling, sequence.begun
        self.owner[slot] = number
        self.tokens[slot, : len(tokens)] = tokens
        self.prompt[slot], self.known[slot] = len(sequence.prompt), len(tokens)
        self.read[slot] = read
        self._limit[slot] = len(sequence.prompt) + sampling.max_new_tokens
        self._since[slot], self._taken = self._taken, self._taken + 1
        self.streams[slot] = draws.stream(sequence.seed, sequence.prompt_id, sequence.index)
        self.temperature[slot] = sampling.temperature
        self.top_k[slot], self.top_p[slot] = sampling.top_k, sampling.top_p
        self._sure[slot] = math.log(sampling.repetition_probability)
        self._streak_limit[slot] = sampling.repetition_length
        self._streak[slot] = 0
        if begun:
            kept = slice(len(sequence.prompt), len(tokens))
            self.logprobs[:, slot, kept] = begun.logprobs, begun.raw_logprobs
            for logprob in begun.raw_logprobs:
                self._streak[slot] = self._streak[slot] + 1 if logprob > self._sure[slot] else 0
        self._texts.pop(slot, None)
        if sampling.stop:
            assert self._tokenizer, "sequences with stop texts are refused without a tokenizer"
            self._texts[slot] = StopTexts(self._tokenizer, sampling.stop)
            for token in tokens[len(sequence.prompt) :]:
                self._texts[slot].completed_by(token)

    def release(self, slot: int) -> None:
        self.owner[slot] = FREE

    def plan(self, budget: int) -> Ints:
        """[N] tokens that each sequence reads in the coming step: the last one of those that are
        otherwise read, and up to ``budget`` for the others of a rank, first come, first served."""
        pending = np.where(self.owner != FREE, self.known - self.read, 0)
        counts = np.where(pending == 1, 1, 0)
        left = [budget] * self.ranks
        waiting = np.flatnonzero(pending > 1)
        for slot in waiting[self._since[waiting].argsort()]:
            rank = slot // self.per_rank
            taken = min(int(pending[slot]), left[rank])
            counts[slot], left[rank] = taken, left[rank] - taken
        return counts

    def draws(self, counts: Ints) -> Ints:
        """The slots whose sequences get a token once ``counts`` tokens are read."""
        return np.flatnonzero((counts > 0) & (self.read + counts == self.known))

    def uniforms(self, slots: Ints) -> NDArray[np.float64]:
        """The uniform numbers that choose these sequences' next tokens."""
        return draws.uniforms(self.streams[slots], self.known[slots] - self.prompt[slots])

    def advance(self, counts: Ints, drawn: NDArray[np.float64]) -> Iterator[tuple[int, str]]:
        """Take in a step's tokens; gives the slots whose sequences end with them, and why.

        Args:
            counts: those of ``plan``.
            drawn: [N, 3] of ``sampling.draw``, where ``draws`` says that there is one.
        """
        slots = self.draws(counts)
        self.read += counts
        places, found = self.known[slots], drawn[slots]
        self.tokens[slots, places] = found[:, 0]
        self.logprobs[:, slots, places] = found[:, 1:].T
        self.known[slots] += 1
        is_sure = found[:, 2] > self._sure[slots]
        self._streak[slots] = np.where(is_sure, self._streak[slots] + 1, 0)

        stopped = found[:, 0] == (np.nan if self.stop_token is None else self.stop_token)
        for number, slot in enumerate(slots):
            if slot in self._texts:
                stopped[number] |= self._texts[slot].completed_by(int(found[number, 0]))
        limits = self._streak_limit[slots]
        repeats = (limits > 0) & (self._streak[slots] >= limits)
        full = self.known[slots] >= self._limit[slots]
        reasons = np.select([stopped, repeats, full], ["stop", "repetition", "length"], "")
        for ended in np.flatnonzero(reasons):
            yield int(slots[ended]), str(reasons[ended])

    def continuation(
        self, slot: int, finish: str, begun: Continuation | None, version: int
    ) -> Continuation:
        """The response in a slot, whose tokens after ``begun`` are of one version."""
        own = slice(int(self.prompt[slot]), int(self.known[slot]))
        versions = list(begun.versions) if begun else []
        tokens = self.tokens[slot, own].tolist()
        return Continuation(
            tokens=tokens,
            logprobs=self.logprobs[0, slot, own].tolist(),
            raw_logprobs=self.logprobs[1, slot, own].tolist(),
            versions=versions + [version] * (len(tokens) - len(versions)),
            finish=finish,
        )


class StopTexts:
    """Finds stop texts in a response that grows."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._stream, self._stops = tokenizer.decode_stream(), stops
        self._kept = max(map(len, stops)) - 1
        self._tail = ""

    def completed_by(self, token: int) -> bool:
        """Whether a stop text is complete with the response's next token."""
        text = self._tail + self._stream.step(token)
        self._tail = text[-self._kept :] if self._kept else ""
        return any(stop in text for stop in self._stops)
