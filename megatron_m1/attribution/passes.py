"""The two computations of the same tokens: the rollout's, by slots, and the trainer's, in rows.

Shapes: N tokens that are read, of all sequences one after another; R of them predict a token of a
response; V tokens of the vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megatron_m1.attribution.recording import Change, Recording, Site, recording
from megatron_m1.inference.generation import Generation, Generator
from megatron_m1.inference.requests import Continuation, SamplingParams, Sequence
from megatron_m1.model.build import forward_row
from megatron_m1.model.cache import CachedRow
from megatron_m1.rl.batch import fill
from parallel import host
from parallel.packing import PackedRow


@dataclass(frozen=True)
class Texts:
    """Sequences and the responses that were drawn to them.

    Attributes:
        logprobs: [R] float64, the model's own as the rollout gave them.
        offsets: where each sequence begins among the tokens that are read.
    """

    sequences: list[Sequence]
    responses: list[list[int]]
    logprobs: Tensor

    @classmethod
    def drawn(cls, generator: Generator, sequences: Listed[Sequence]) -> Texts:
        """By the rollout engine as it is."""
        found: dict[int, Continuation] = dict(generator.run(sequences))
        answers = [found[number] for number in range(len(sequences))]
        logprobs = [value for one in answers for value in one.raw_logprobs]
        return cls(
            list(sequences),
            [one.tokens for one in answers],
            torch.tensor(logprobs, dtype=torch.float64),
        )

    @property
    def documents(self) -> list[Tensor]:
        """Prompt and response of each."""
        return [
            torch.tensor([*sequence.prompt, *response])
            for sequence, response in zip(self.sequences, self.responses, strict=True)
        ]

    @property
    def offsets(self) -> list[int]:
        lengths = [len(tokens) - 1 for tokens in self.documents]
        return list(accumulate(lengths, initial=0))

    @property
    def predicting(self) -> Tensor:
        """[R] the tokens, of N, that predict one of a response."""
        return torch.cat(
            [
                torch.arange(end - len(response), end)
                for end, response in zip(self.offsets[1:], self.responses, strict=True)
            ]
        )

    @property
    def targets(self) -> Tensor:
        """[R] the tokens of the responses."""
        return torch.tensor([token for response in self.responses for token in response])


def roll_out(
    generator: Generator, sites: Listed[Site], texts: Texts, change: Change | None = None
) -> Recording:
    """The rollout of ``texts`` once more, step by step as it was drawn, recorded and changed."""
    sequences = [
        replace(sequence, sampling=SamplingParams(max_new_tokens=len(response)))
        for sequence, response in zip(texts.sequences, texts.responses, strict=True)
    ]
    generation = _Repeated.of(generator, sequences)
    assert isinstance(generation, _Repeated)
    with recording(sites, texts.offsets[-1], change) as kept:
        generation.repeat(texts, kept)
    return kept


class _Repeated(Generation):
    """A generation whose draws are known, that says which tokens it reads."""

    def repeat(self, texts: Texts, kept: Recording) -> None:
        """Draw the responses again, to the end."""
        self._texts, self._kept = texts, kept
        self._offsets = torch.tensor(texts.offsets)
        self._slots.stop_token = None
        while self.unfinished:
            self.step()

    def _logits(self, rows: list[tuple[CachedRow, list[int]]]) -> Tensor | None:
        ((row, _),) = rows
        slots, positions = row.places()
        owners = torch.from_numpy(self._slots.owner)[slots]
        self._kept.where = self._offsets[owners] + positions
        self._kept.wanted = row.wanted.cpu()
        return super()._logits(rows)

    def _drawn(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        found, slots = super()._drawn(counts), self._slots
        for slot in slots.draws(counts):
            response = self._texts.responses[slots.owner[slot]]
            found[slot, 0] = response[slots.known[slot] - slots.prompt[slot]]
        return found


def train(
    chunk: nn.Module, sites: Listed[Site], texts: Texts, row_tokens: int
) -> tuple[Recording, Tensor]:
    """The forward pass of an update on ``texts``, packed into rows: what was recorded, and the
    log-probabilities [R] float64 by the path of the loss."""
    documents, offsets = texts.documents, texts.offsets
    lengths = [len(tokens) - 1 for tokens in documents]
    losses = torch.zeros(offsets[-1], dtype=torch.float64)
    with recording(sites, offsets[-1]) as kept:
        for members in fill(lengths, max(row_tokens, *lengths), 1):
            row = PackedRow.from_documents(
                [documents[i][:-1] for i in members], [documents[i][1:] for i in members]
            )
            kept.where = torch.cat([offsets[i] + torch.arange(lengths[i]) for i in members])
            found = forward_row(chunk.train(), row.to(host.device()))
            losses[kept.where] = found.detach()[0].double().cpu()
    head = len(sites) - 1
    kept.outputs[head] = _logits(sites[head].module, kept.inputs[head])
    return kept, -losses[texts.predicting]


@torch.no_grad()
def _logits(head: Any, hidden_NC: Tensor) -> Tensor:
    """[N, V] by the head as it trains, which makes losses without them."""
    logits, _ = head(hidden_NC[:, None])
    return logits[:, 0]
