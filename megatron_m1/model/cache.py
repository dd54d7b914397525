"""What generation keeps of the tokens that the model has read, and rows of tokens that follow them.

A slot belongs to one sequence at a time. Of a lightning layer it holds the state, of constant size;
of a softmax layer the keys and values, in a row of as many places as the longest sequence has
tokens. (Pages would save memory where lengths differ much, but one layer in eight keeps keys at
all, and PyTorch's attention kernels take rows.)

Shapes: P slots, M places of a slot, T tokens of the row, S of them alone in their sequences; H
query heads and K key/value heads on this rank, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention.cached import attend_next, attend_one
from kernels.lightning.decode import lightning_decode, lightning_prefill
from megatron_m1.model.routing import Routing


class KeysValues(NamedTuple):
    """Of one softmax layer, both [P, K, M, D]; of one slot without P."""

    keys: Tensor
    values: Tensor


@dataclass
class SavedSlot:
    """A copy, in host memory, of what a slot held of one sequence."""

    states: dict[int, Tensor]
    keys_values: dict[int, KeysValues]


@dataclass
class Cache:
    """The slots of this process, by the numbers of its layers.

    Attributes:
        states: [P, H, D, D] of each lightning layer.
        keys_values: of each softmax layer.
    """

    states: dict[int, Tensor] = field(default_factory=dict)
    keys_values: dict[int, KeysValues] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: Iterable, slots: int, places: int) -> Cache:
        """For Megatron layers with our attention."""
        cache = cls()
        for layer in layers:
            layer.self_attention.add_to_cache(cache, slots, places)
        return cache

    def clear(self, slot: int) -> None:
        """Forget the sequence that the slot belonged to, whatever it left there."""
        for states in self.states.values():
            states[slot].zero_()
        for layer in self.keys_values.values():
            layer.keys[slot].zero_()
            layer.values[slot].zero_()

    def save(self, slot: int, tokens: int) -> SavedSlot:
        """What the slot holds of a sequence of which ``tokens`` tokens were read."""
        return SavedSlot(
            {number: states[slot].to("cpu", copy=True) for number, states in self.states.items()},
            {
                number: KeysValues(*(x[slot, :, :tokens].to("cpu", copy=True) for x in layer))
                for number, layer in self.keys_values.items()
            },
        )

    def restore(self, slot: int, saved: SavedSlot) -> None:
        self.clear(slot)
        for number, state in saved.states.items():
            self.states[number][slot] = state
        for number, layer in saved.keys_values.items():
            for pool, rows in zip(self.keys_values[number], layer, strict=True):
                pool[slot, :, : rows.shape[1]] = rows


class Piece(NamedTuple):
    """``tokens`` neighbouring tokens of a sequence that follow its first ``before`` ones."""

    slot: int
    before: int
    tokens: int


@dataclass
class CachedRow:
    """Tokens of many sequences, each of which follows what the cache holds of its sequence.

    First single tokens, in the order of their slots, then pieces side by side, then filling. No
    slot comes twice.

    Attributes:
        tokens, positions: [T] int64.
        singles: slots of the single tokens.
        lengths: tokens of their sequences, the single one included.
        wanted: [n] int64, which tokens' logits are wanted.
    """

    cache: Cache
    tokens: Tensor
    positions: Tensor
    singles: list[int]
    lengths: list[int]
    pieces: Sequence[Piece]
    wanted: Tensor
    routing: Routing | None = None

    def __post_init__(self) -> None:
        device = self.tokens.device
        self._single_index = _index(self.singles, device)
        self._places = torch.tensor([self.singles, self.lengths], device=device)
        self._places[1] -= 1
        self._piece_slots = torch.tensor([piece.slot for piece in self.pieces], device=device)
        bounds = list(accumulate((piece.tokens for piece in self.pieces), initial=0))
        self._piece_bounds = torch.tensor(bounds, dtype=torch.int32)
        self._end = len(self.singles) + bounds[-1]

    def __len__(self) -> int:
        """T."""
        return self.tokens.shape[0]

    def places(self) -> tuple[Tensor, Tensor]:
        """Slots and positions of all tokens but the filling, on the host."""
        slots = [*self.singles, *(piece.slot for piece in self.pieces)]
        tokens = [1] * len(self.singles) + [piece.tokens for piece in self.pieces]
        each = torch.tensor(slots, dtype=torch.int64).repeat_interleave(torch.tensor(tokens).long())
        return each, self.positions[: self._end].cpu()

    def lightning(self, layer: int, qkv_TH3D: Tensor, decay_H: Tensor) -> Tensor:
        """Lightning attention onto the states of a layer: [T, H * D]."""
        states, count = self.cache.states[layer], len(self.singles)
        mixed = []
        if count:
            q, k, v = qkv_TH3D[:count].chunk(3, dim=-1)
            mixed.append(lightning_decode(q, k, v, decay_H, states, self._single_index, silu=True))
        if self.pieces:
            q, k, v = qkv_TH3D[None, count : self._end].chunk(3, dim=-1)
            slots, bounds = self._piece_slots, self._piece_bounds
            mixed.append(
                lightning_prefill(q, k, v, decay_H, states, slots, cu_seqlens=bounds, silu=True)[0]
            )
        return self._joined(mixed, qkv_TH3D.shape[1] * qkv_TH3D.shape[2] // 3, qkv_TH3D)

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Softmax attention to the keys and values of a layer, these tokens' among them:
        [T, H * D]."""
        keys, values = self.cache.keys_values[layer]
        begin, mixed = len(self.singles), []
        if begin:
            slots, last = self._places
            keys[slots, :, last] = k_TKD[:begin]
            values[slots, :, last] = v_TKD[:begin]
            mixed.append(attend_one(q_THD[:begin], keys, values, self.singles, self.lengths))
        for slot, before, tokens in self.pieces:
            own = slice(begin, begin + tokens)
            q, k, v = q_THD[own], k_TKD[own], v_TKD[own]
            mixed.append(attend_next(q, k, v, keys[slot], values[slot], before))
            keys[slot, :, before : before + tokens] = k.transpose(0, 1)
            values[slot, :, before : before + tokens] = v.transpose(0, 1)
            begin += tokens
        return self._joined(mixed, q_THD.shape[1] * q_THD.shape[2], q_THD)

    def _joined(self, parts: list[Tensor], width: int, like: Tensor) -> Tensor:
        """Parts [.., H, D] one after another, and zeros for the filling: [T, H * D]."""
        parts = [part.flatten(1) for part in parts]
        if self._end < len(self):
            parts.append(like.new_zeros(len(self) - self._end, width))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _index(slots: list[int], device: torch.device) -> Tensor | slice:
    """Slots at equal distances as a slice: on a CPU views of the pool are faster than copies."""
    if device.type == "cpu" and slots:
        step = slots[1] - slots[0] if len(slots) > 1 else 1
        if slots == list(range(slots[0], slots[-1] + 1, step)):
            return slice(slots[0], slots[-1] + 1, step)
    return torch.tensor(slots, dtype=torch.int64, device=device)
