"""Generation by the model's own chunks, with the weights that training has, in any layout.

A sequence takes a slot, its prompt is read in pieces, and then one token at a time is drawn and
read. In every step each data-parallel rank reads one packed row: the last tokens of the sequences
that are drawing, and pieces of those that are not read yet (Sarathi's chunked prefill, arXiv
2308.16369), one row for each pipeline stage so that all stages work. What was drawn is made known
to all ranks by one all-reduce a step, whatever the layout; everything else follows from it.

Shapes: N slots of all data-parallel ranks, T tokens of a row, L layers, K experts of a token.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Listed
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from numpy.typing import NDArray
from torch import Tensor, nn

from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.errors import NotFinite
from megatron_m1.inference.requests import Continuation, Sequence
from megatron_m1.inference.sampling import draw
from megatron_m1.inference.slots import Slots
from megatron_m1.model.build import continue_row, unwrap
from megatron_m1.model.cache import Cache, CachedRow, Piece, SavedSlot
from megatron_m1.model.routing import Routing
from megatron_m1.model.schedule import run_schedule
from parallel import host

Finished = tuple[int, Continuation]
"""The number of a sequence among those that were asked for, and what became of it."""


@dataclass(frozen=True)
class Paused:
    """A sequence that was paused with these tokens, and where its state is.

    Attributes:
        rank: the data-parallel rank that has it.
        saved: None on other ranks.
        experts: those recorded for the tokens that were read.
    """

    tokens: list[int]
    rank: int
    saved: SavedSlot | None
    experts: Tensor | None


class Generator:
    """Continues sequences with the model in ``chunks``. Collective: every process makes the same
    calls, and gets the same results.

    Args:
        slots: sequences at a time on each data-parallel rank (and context-parallel, which serves as
            such here).
        prefill_tokens: tokens of prompts that one rank reads in a step.
        stop_token: ends a response.
        tokenizer: for stop texts.
        record_experts: keep which experts each token went to.

    Attributes:
        version: of the weights; tokens are marked with it.
    """

    def __init__(
        self,
        chunks: list[nn.Module],
        *,
        slots: int = 16,
        prefill_tokens: int = 2048,
        stop_token: int | None = None,
        tokenizer: Tokenizer | None = None,
        record_experts: bool = False,
    ) -> None:
        self.chunks, self.slots, self.prefill_tokens = chunks, slots, prefill_tokens
        self.stop_token, self.tokenizer = stop_token, tokenizer
        self.record_experts = record_experts
        self.version = 0
        self.paused: dict[tuple[int, int], Paused] = {}

    def run(self, sequences: Listed[Sequence], stop_after: int | None = None) -> Iterator[Finished]:
        """Sequences as they finish. Once ``stop_after`` have, the others are given as they stand,
        with ``finish="paused"``; what they had in their slots is kept for when they go on.

        Raises:
            ValueError: a sequence without a prompt, or with tokens that the model does not have.
            NotFinite: the model's logits are not numbers.
        """
        generation = Generation.of(self, sequences)
        finished = 0
        while generation.unfinished and (stop_after is None or finished < stop_after):
            for ended in generation.step():
                finished += 1
                yield ended
        yield from generation.pause()

    def tokens(self, sequence: Sequence) -> Iterator[int]:
        """The tokens of one response as they are drawn."""
        generation = Generation.of(self, [sequence])
        given = 0
        while generation.unfinished:
            ended = generation.step()
            tokens = ended[0][1].tokens if ended else generation.response_so_far()
            yield from tokens[given:]
            given = len(tokens)

    def weights_changed(self, version: int) -> None:
        """Forget what was computed with older weights."""
        self.version = version
        self.paused.clear()


class Generation:
    """Sequences on their way through the slots.

    Args:
        slots: of each rank.
        places: tokens of prompt and response that a slot has room for.

    Attributes:
        unfinished: numbers of the sequences that are not finished.
    """

    def __init__(self, generator: Generator, slots: int, places: int) -> None:
        self._generator = generator
        self._sequences: dict[int, Sequence] = {}
        model = unwrap(generator.chunks[0])
        for chunk in generator.chunks:
            chunk.eval()
        self._ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        self._rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        self._slots = Slots(self._ranks, slots, places, generator.stop_token, generator.tokenizer)
        layers = [unwrap(chunk).decoder.layers for chunk in generator.chunks]
        self._cache = Cache.of(itertools.chain(*layers), slots, places)
        self._experts = None
        if generator.record_experts:
            shape = slots, places, model.config.num_layers, model.config.moe_router_topk
            self._experts = torch.zeros(shape, dtype=torch.int16)
        self._waiting: deque[int] = deque()
        self._numbers = itertools.count()
        self.unfinished: set[int] = set()

    @classmethod
    def of(cls, generator: Generator, sequences: Listed[Sequence]) -> Generation:
        """One that has room for these, and numbers them from 0.

        Raises:
            ValueError: one that cannot be continued.
        """
        vocabulary = unwrap(generator.chunks[0]).vocab_size
        for number, sequence in enumerate(sequences):
            _check(number, sequence, vocabulary, generator.tokenizer)
        # Never more slots than sequences: a rank's share of them.
        ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        slots = min(generator.slots, -(-len(sequences) // ranks))
        places = max((len(s.prompt) + s.sampling.max_new_tokens for s in sequences), default=1)
        generation = cls(generator, slots, max([places, *(len(s.tokens) + 1 for s in sequences)]))
        for sequence in sequences:
            generation.add(sequence)
        return generation

    def add(self, sequence: Sequence) -> int:
        """Let a sequence wait for a slot; returns its number."""
        number = next(self._numbers)
        self._sequences[number] = sequence
        self._waiting.append(number)
        self.unfinished.add(number)
        return number

    def drop(self, number: int) -> None:
        """Forget an unfinished sequence; its slot becomes free."""
        self._forget(number)
        if number in self._waiting:
            self._waiting.remove(number)
        for slot in np.flatnonzero(self._slots.owner == number):
            self._slots.release(int(slot))

    @torch.no_grad()
    def step(self) -> list[Finished]:
        """One forward pass: what it finishes, in the order of the slots."""
        ended = self._admit()
        slots = self._slots
        if not slots.busy.size:
            return ended
        counts = slots.plan(self._generator.prefill_tokens)
        drawn = self._drawn(counts)
        for slot, reason in slots.advance(counts, drawn):
            ended.append(self._ended(slot, reason))
            slots.release(slot)
        return ended

    @torch.no_grad()
    def pause(self) -> Iterator[Finished]:
        """Give up the slots: what there is of every unfinished sequence, in their order."""
        slots = self._slots
        drawing = {
            int(slots.owner[slot]): int(slot)
            for slot in slots.busy
            if slots.read[slot] == slots.known[slot] - 1
        }
        for number in sorted(self.unfinished):
            sequence = self._sequences[number]
            if number in drawing:
                self._keep(drawing[number], sequence)
                yield self._ended(drawing[number], "paused")
            else:
                yield number, replace(sequence.begun or Continuation(), finish="paused")
        self.unfinished.clear()

    @property
    def is_decoding(self) -> bool:
        """Whether every sequence is read and draws a token in each step."""
        slots = self._slots
        return not self._waiting and bool((slots.read == slots.known - 1)[slots.busy].all())

    def response_so_far(self) -> list[int]:
        """The tokens of the only sequence."""
        (slot,) = self._slots.busy
        own = slice(self._slots.prompt[slot], self._slots.known[slot])
        return self._slots.tokens[slot, own].tolist()

    def _admit(self) -> list[Finished]:
        """Give free slots to those who wait, first come, first served."""
        ended = []
        while self._waiting:
            number = self._waiting[0]
            sequence = self._sequences[number]
            begun = sequence.begun
            if begun and len(begun.tokens) >= sequence.sampling.max_new_tokens:
                self._waiting.popleft()
                self._forget(number)
                ended.append((number, replace(begun, finish="length")))
                continue
            slot, paused = self._place(sequence)
            if slot is None:
                break
            self._waiting.popleft()
            self._slots.take(slot, number, sequence, len(paused.tokens) - 1 if paused else 0)
            if slot // self._slots.per_rank == self._rank:
                self._fill(slot % self._slots.per_rank, paused)
        return ended

    def _place(self, sequence: Sequence) -> tuple[int | None, Paused | None]:
        """A free slot, and what was kept of the sequence where the slot is on the same rank."""
        key = sequence.prompt_id, sequence.index
        paused = self._generator.paused.get(key)
        if paused and paused.tokens == sequence.tokens:
            slot = self._slots.free(paused.rank)
            if slot is not None:
                return slot, self._generator.paused.pop(key)
        slot = self._slots.free()
        if slot is not None:
            self._generator.paused.pop(key, None)
        return slot, None

    def _fill(self, slot: int, paused: Paused | None) -> None:
        """Make one of this rank's slots what a sequence starts from."""
        if paused is None or paused.saved is None:
            self._cache.clear(slot)
        else:
            self._cache.restore(slot, paused.saved)
        if self._experts is not None:
            self._experts[slot].zero_()
            if paused is not None and paused.experts is not None:
                self._experts[slot, : len(paused.experts)] = paused.experts

    def _keep(self, slot: int, sequence: Sequence) -> None:
        """Keep what the slot holds of a sequence that is drawing, for when it goes on."""
        slots = self._slots
        known, read = int(slots.known[slot]), int(slots.read[slot])
        rank, local = divmod(slot, slots.per_rank)
        saved = experts = None
        if rank == self._rank:
            saved = self._cache.save(local, read)
            if self._experts is not None:
                experts = self._experts[local, :read].clone()
        tokens = slots.tokens[slot, :known].tolist()
        key = sequence.prompt_id, sequence.index
        self._generator.paused[key] = Paused(tokens, rank, saved, experts)

    def _drawn(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Read what each slot is to read: [N, 3] of ``sampling.draw`` on every process."""
        rows = self._rows(counts)
        logits = self._logits(rows)
        found = np.zeros((len(counts), 3))
        drawing = [slot for _, slots in rows for slot in slots]
        if logits is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
            mine = np.array(drawing, dtype=np.int64)
            slots = self._slots
            found[mine] = draw(
                logits,
                slots.uniforms(mine),
                slots.temperature[mine],
                slots.top_k[mine],
                slots.top_p[mine],
            ).cpu()
        if dist.get_world_size() > 1:
            everyones = torch.from_numpy(found).to(host.device())
            dist.all_reduce(everyones)
            found = everyones.cpu().numpy()
        if not np.isfinite(found).all():
            raise NotFinite("generation: the model's logits are not finite numbers")
        return found

    def _rows(self, counts: NDArray[np.int64]) -> list[tuple[CachedRow, list[int]]]:
        """This rank's rows, one for each pipeline stage, and the slots whose sequences draw a token
        after each."""
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        begin = self._rank * self._slots.per_rank
        own = begin + np.flatnonzero(counts[begin : begin + self._slots.per_rank])
        shares = [own[(own - begin) % stages == stage] for stage in range(stages)]
        longest = max(int(counts[share].sum()) for share in shares)
        multiple = parallel_state.get_tensor_model_parallel_world_size()
        # Where there is nothing to read a token of filling keeps ranks company that exchange
        # tokens for their experts.
        length = -(-max(longest, 1) // multiple) * multiple
        return [self._row(share, counts, begin, length) for share in shares]

    def _row(
        self, share: NDArray[np.int64], counts: NDArray[np.int64], begin: int, length: int
    ) -> tuple[CachedRow, list[int]]:
        slots, device = self._slots, host.device()
        singles, others = share[counts[share] == 1], share[counts[share] > 1]
        pieces = [Piece(int(s - begin), int(slots.read[s]), int(counts[s])) for s in others]
        order = np.concatenate([singles, others.repeat(counts[others])])
        positions = np.concatenate(
            [
                slots.read[singles],
                *(np.arange(before, before + tokens) for _, before, tokens in pieces),
            ]
        ).astype(np.int64)
        ends = np.concatenate([np.arange(len(singles)), len(singles) - 1 + counts[others].cumsum()])
        ordered = np.concatenate([singles, others])
        draws = np.isin(ordered, slots.draws(counts))
        filling = (0, length - len(order))
        tokens = np.pad(slots.tokens[order, positions], filling)
        row = CachedRow(
            self._cache,
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(np.pad(positions, filling)).to(device),
            (singles - begin).tolist(),
            (slots.read[singles] + 1).tolist(),
            pieces,
            torch.from_numpy(ends[draws]).to(device),
            self._routing(length),
        )
        return row, ordered[draws].tolist()

    def _routing(self, length: int) -> Routing | None:
        if self._experts is None:
            return None
        shape = length, *self._experts.shape[2:]
        return Routing(chosen=torch.zeros(shape, dtype=torch.int16, device=host.device()))

    def _logits(self, rows: list[tuple[CachedRow, list[int]]]) -> Tensor | None:
        """[n, V] of all sequences that draw, on the last pipeline stage."""
        given = [row for row, _ in rows]
        if len(self._generator.chunks) == len(given) == 1:
            alone = dist.get_world_size() == 1
            with host.as_it_is() if alone else contextlib.nullcontext():
                found = [continue_row(self._generator.chunks[0], given[0])]
        else:
            found = run_schedule(
                self._generator.chunks,
                given,
                lambda logits, row: logits,
                forward_only=True,
                forward=continue_row,
            )
        self._record(given)
        if not found:
            return None
        local = torch.cat([logits[0] for logits in found])
        return gather_from_tensor_model_parallel_region(local)

    def _record(self, rows: list[CachedRow]) -> None:
        """Keep the experts that this process's routers chose for the tokens of the rows."""
        if self._experts is None:
            return
        for row in rows:
            assert row.routing and row.routing.chosen is not None
            slots, positions = row.places()
            self._experts[slots, positions] = row.routing.chosen[: len(slots)].cpu()

    def _ended(self, slot: int, finish: str) -> Finished:
        number = int(self._slots.owner[slot])
        begun = self._forget(number).begun
        version = self._generator.version
        continuation = self._slots.continuation(slot, finish, begun, version)
        if self._experts is not None:
            continuation.experts = self._gathered(slot, begun)
        return number, continuation

    def _forget(self, number: int) -> Sequence:
        self.unfinished.discard(number)
        return self._sequences.pop(number)

    def _gathered(self, slot: int, begun: Continuation | None) -> Tensor:
        """The experts of a sequence's tokens, each known to one process. Collective."""
        assert self._experts is not None
        rank, local = divmod(slot, self._slots.per_rank)
        read = int(self._slots.known[slot]) - 1
        experts = self._experts[local, :read].int().to(host.device())
        if rank != self._rank:
            experts.zero_()
        if dist.get_world_size() > 1:
            dist.all_reduce(experts)
        found = experts.short().cpu()
        if begun and begun.experts is not None:
            # Tokens that were read again were drawn after the experts of the first time.
            found[: len(begun.experts)] = begun.experts
        return found


def _check(number: int, sequence: Sequence, vocabulary: int, tokenizer: Tokenizer | None) -> None:
    problems = sequence.sampling.problems()
    if problems:
        raise ValueError(f"sequence {number}: {problems[0]}")
    if not sequence.prompt:
        raise ValueError(f"sequence {number} has no prompt: it needs a token to follow")
    tokens = sequence.tokens
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        raise ValueError(f"sequence {number} has ids outside the vocabulary 0..{vocabulary - 1}")
    if sequence.sampling.stop and tokenizer is None:
        raise ValueError(f"sequence {number} has stop texts, which need a tokenizer")
