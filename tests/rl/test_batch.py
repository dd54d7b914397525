"""Packed rows of responses: nothing lost, nothing padded within, weights of the whole minibatch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_m1.rl.batch import ADVANTAGES, ROLLOUT, WEIGHTS, fill, pack, samples_of
from megatron_m1.rl.groups import parts
from parallel.layout import Layout
from tests.rl.stored import rl_config, stored_groups

RL = rl_config("unused").rl
WINDOW = 24


def test_rows_hold_every_response_once_with_its_values() -> None:
    samples = samples_of(stored_groups(), RL, WINDOW)
    rows = pack(samples, 64, Layout(), 1)
    assert len({len(row) for row in rows}) == 1
    trained = sum(int(row.loss_mask.sum()) for row in rows)
    assert trained == sum(len(sample.response.tokens) for sample in samples)
    found = []
    for row in rows:
        bounds = row.cu_seqlens.tolist()
        for begin, end in zip(bounds, bounds[1:], strict=False):
            mask = row.loss_mask[begin:end].bool()
            if mask.any():
                found.append(
                    (
                        row.labels[begin:end][mask].tolist(),
                        row.extra[ROLLOUT][begin:end][mask].tolist(),
                        set(row.extra[ADVANTAGES][begin:end][mask].tolist()),
                        row.tokens[begin:end][~mask].tolist(),
                    )
                )
    expected = [
        (
            sample.response.tokens,
            torch.tensor(sample.response.raw_logprobs).tolist(),
            {torch.tensor(sample.advantage).item()},
            list(sample.prompt[:-1]),
        )
        for sample in samples
    ]
    assert sorted(found) == sorted(expected)


def test_only_the_end_of_a_row_is_padded() -> None:
    rows = pack(samples_of(stored_groups(), RL, WINDOW), 64, Layout(), 1)
    for row in rows:
        padding = row.padding.int()
        assert bool((padding.diff() >= 0).all())
    used = sum(int((~row.padding).sum()) for row in rows)
    assert used > 0.9 * sum(map(len, rows))


@pytest.mark.parametrize("aggregation", ["prompt_mean", "token_mean", "sequence_mean"])
def test_weights_have_the_mean_one_over_the_minibatch(aggregation: str) -> None:
    rl = replace(RL, aggregation=aggregation, sequence_share=0.3)
    rows = pack(samples_of(stored_groups(), rl, WINDOW), 40, Layout(), 2)
    weights = torch.cat([row.extra[WEIGHTS] for row in rows])
    mask = torch.cat([row.loss_mask for row in rows])
    assert float(weights.sum() / mask.sum()) == pytest.approx(1)


def test_responses_that_could_not_be_judged_are_left_out() -> None:
    groups = stored_groups()
    groups[0].scored[1] = replace(groups[0].scored[1], failed=True, reward=1e6)
    samples = samples_of(groups, RL, WINDOW)
    assert (samples[1].advantage, samples[1].weight) == (0.0, 0.0)
    assert max(abs(sample.advantage) for sample in samples) < 3
    rows = pack(samples, 64, Layout(), 1)
    trained = sum(int(row.loss_mask.sum()) for row in rows)
    lost = len(groups[0].scored[1].response.tokens)
    assert trained == sum(len(sample.response.tokens) for sample in samples) - lost


def test_the_end_of_the_window_costs_reward() -> None:
    rl = replace(RL, overlong_buffer=8, overlong_penalty=100.0)
    group = stored_groups(prompts=1)[0]
    longest = max(range(4), key=lambda i: len(group.scored[i].response.tokens))
    assert len(group.scored[longest].response.tokens) > WINDOW - 8
    samples = samples_of([group], rl, WINDOW)
    assert samples[longest].advantage == min(sample.advantage for sample in samples)


@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize("capacity", [10, 17, 100])
def test_bins_stay_within_their_capacity(capacity: int, multiple: int) -> None:
    lengths = [10, 1, 7, 7, 7, 3, 3, 9, 10, 2]
    bins = fill(lengths, capacity, multiple)
    assert len(bins) % multiple == 0
    assert sorted(index for members in bins for index in members) == list(range(10))
    assert max(sum(lengths[i] for i in members) for members in bins) <= capacity


def test_more_ranks_than_responses_leaves_rows_of_padding() -> None:
    samples = samples_of(stored_groups(prompts=1), RL, WINDOW)[:1]
    rows = pack(samples, 64, Layout(), 4)
    assert len(rows) == 4
    assert len({len(row) for row in rows}) == 1
    assert [int(row.loss_mask.sum()) > 0 for row in rows].count(True) == 1


def test_a_batch_is_shared_by_its_updates() -> None:
    groups = stored_groups(prompts=5)
    sizes = [[group.prompt.id for group in part] for part in parts(groups, 3)]
    assert sizes == [[0], [1, 2], [3, 4]]
    assert [len(part) for part in parts(groups[:2], 3)] == [1, 1]
    assert parts([], 3) == []
