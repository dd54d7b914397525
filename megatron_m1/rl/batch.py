"""From judged groups to packed rows: prompts and responses side by side, with what the loss needs
of each token, and no padding but at the end of a row.

T  tokens of a row
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_m1.model.routing import EXPERTS
from megatron_m1.rl.advantages import group_advantages
from megatron_m1.rl.aggregation import response_weights
from megatron_m1.rl.config import PolicyConfig
from megatron_m1.rl.groups import Group
from megatron_m1.rl.samples import Response
from megatron_m1.rl.shaping import overlong_penalty
from parallel.layout import Layout
from parallel.packing import PackedRow

# Names of a row's extra tensors.
ADVANTAGES = "advantages"
WEIGHTS = "weights"
ROLLOUT = "rollout_logprobs"
OLD = "old_logprobs"
ENTROPY = "entropies"


@dataclass(frozen=True)
class Sample:
    """A response to train on.

    Attributes:
        prompt: its tokens, at least one.
        weight: of each of its tokens in the sum of the minibatch, whose tokens have the weight 1 on
            average; 0 leaves it out.
    """

    prompt: tuple[int, ...]
    response: Response
    advantage: float
    weight: float

    def __len__(self) -> int:
        """Positions in a row: the last token is only predicted."""
        return len(self.prompt) + len(self.response.tokens) - 1


def samples_of(groups: Sequence[Group], rl: PolicyConfig, window: int) -> list[Sample]:
    """The responses of a minibatch with their advantages, and the weights of their tokens in it."""
    members = [(group, scored) for group in groups for scored in group.scored]
    lengths = torch.tensor([len(scored.response.tokens) for _, scored in members])
    prompts = torch.tensor([group.prompt.id for group, _ in members])
    valid = torch.tensor([not scored.failed for _, scored in members])
    rewards = torch.tensor(
        [
            scored.reward
            + overlong_penalty(int(length), window, rl.overlong_buffer, rl.overlong_penalty)
            for (_, scored), length in zip(members, lengths, strict=True)
        ]
    )
    advantages = group_advantages(rewards, prompts, valid).tolist()
    live = lengths * valid
    weights = response_weights(live, prompts, rl.aggregation, rl.sequence_share) * live.sum()
    return [
        Sample(group.tokens, scored.response, advantage, weight)
        for (group, scored), advantage, weight in zip(
            members, advantages, weights.tolist(), strict=True
        )
    ]


def pack(
    samples: Sequence[Sample], row_tokens: int, layout: Layout, data_size: int
) -> list[PackedRow]:
    """Rows of one length for all data-parallel ranks, rank r's being every ``data_size``-th from r.

    Args:
        row_tokens: tokens that a row may hold; a longer response makes all rows as long as itself.
    """
    multiple = data_size * (layout.pp if layout.vpp else 1)
    lengths = [len(sample) for sample in samples]
    bins = fill(lengths, max(row_tokens, *lengths), multiple)
    longest = max(sum(lengths[i] for i in members) for members in bins)
    length = math.ceil(longest / layout.row_multiple) * layout.row_multiple
    return [_row([samples[i] for i in members], length) for members in bins]


def fill(lengths: Sequence[int], capacity: int, multiple: int) -> list[list[int]]:
    """Indices of the lengths in the fewest bins, a multiple of ``multiple``, in which the longest
    first, each into the emptiest, stay within ``capacity``."""
    count = math.ceil(sum(lengths) / capacity / multiple) * multiple
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for index in order:
            emptiest = filled.index(min(filled))
            bins[emptiest].append(index)
            filled[emptiest] += lengths[index]
        if max(filled) <= capacity:
            return bins
        count += multiple


def _row(samples: Sequence[Sample], length: int) -> PackedRow:
    whole = [torch.tensor([*sample.prompt, *sample.response.tokens]) for sample in samples]
    row = PackedRow.from_documents(
        [tokens[:-1] for tokens in whole], [tokens[1:] for tokens in whole], pad_to=length
    )
    ones = [torch.ones(len(sample.response.tokens)) for sample in samples]
    values = {
        ADVANTAGES: [one * sample.advantage for one, sample in zip(ones, samples, strict=True)],
        WEIGHTS: [one * sample.weight for one, sample in zip(ones, samples, strict=True)],
        ROLLOUT: [torch.tensor(sample.response.raw_logprobs) for sample in samples],
    }
    extra = {name: _at_responses(samples, parts, length) for name, parts in values.items()}
    if all(sample.response.experts is not None for sample in samples):
        extra |= _experts(samples, length)
    return replace(row, loss_mask=(extra[WEIGHTS] != 0).float(), extra=extra)


def _experts(samples: Sequence[Sample], length: int) -> dict[str, Tensor]:
    """[length, L, K], one more than the number of each expert that the rollout sent a token to; 0
    leaves padding to the router."""
    given = [sample.response.experts for sample in samples if sample.response.experts is not None]
    if not given:
        return {}
    row = torch.zeros(length, *given[0].shape[1:], dtype=torch.int64)
    used = torch.cat(given) + 1
    row[: len(used)] = used
    return {EXPERTS: row}


def _at_responses(samples: Sequence[Sample], parts: Sequence[Tensor], length: int) -> Tensor:
    """[length], the parts where their responses are predicted and 0 elsewhere."""
    row = torch.zeros(length)
    begin = 0
    for sample, part in zip(samples, parts, strict=True):
        end = begin + len(sample)
        row[end - len(part) : end] = part
        begin = end
    return row
