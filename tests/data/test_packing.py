from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from megatron_m1.data.packing import ConcatenatedPlan, PackedPlan, best_fit

L = 16
EDGES = {
    "nothing": [],
    "only empty": [0, 0],
    "only single tokens": [1, 1, 1],
    "empty and single between": [0, 5, 1, 0, 7, 1],
    "exactly a row": [L + 1],
    "a token more than a row": [L + 2],
    "exactly two rows": [2 * L + 1],
    "several rows and a bit": [5 * L + 4, 3],
    "one position": [2],
    "random": np.random.default_rng(0).integers(0, 5 * L, 200).tolist(),
    "random short": np.random.default_rng(1).integers(0, 6, 200).tolist(),
}


def predicted(plan, epoch):
    """The (input, label) pairs that count, of all rows of an epoch."""
    rows = [plan.row(i, epoch) for i in range(len(plan))]
    if not rows:
        return torch.empty(0, 2, dtype=torch.int64)
    counted = [row.loss_mask == 1 for row in rows]
    pairs = [torch.stack([r.tokens[c], r.labels[c]], 1) for r, c in zip(rows, counted, strict=True)]
    return torch.cat(pairs)


@pytest.mark.parametrize("lengths", EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize("epoch", [0, 3])
def test_packed_predicts_every_token_but_a_first_exactly_once(counting, lengths, epoch):
    source = counting(lengths)
    pairs = predicted(PackedPlan(source, L, seed=5), epoch)
    firsts = set(source.first[source.lengths > 0].tolist())
    expected = [t for t in range(sum(lengths)) if t not in firsts]
    assert sorted(pairs[:, 1].tolist()) == expected
    assert torch.equal(pairs[:, 0] + 1, pairs[:, 1])


@pytest.mark.parametrize("lengths", EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize("epoch", [0, 3])
def test_concatenated_predicts_every_token_but_the_first_exactly_once(counting, lengths, epoch):
    source = counting(lengths)
    pairs = predicted(ConcatenatedPlan(source, L, seed=5), epoch)
    labels = pairs[:, 1].tolist()
    assert len(labels) == max(sum(lengths) - 1, 0)
    missing = set(range(sum(lengths))) - set(labels)
    assert len(missing) == min(sum(lengths), 1)
    assert missing <= set(source.first.tolist())


@pytest.mark.parametrize("plan_of", [PackedPlan, ConcatenatedPlan])
def test_rows_are_well_formed(counting, plan_of):
    plan = plan_of(counting(EDGES["random"]), L, seed=1)
    labels = 0
    for i in range(len(plan)):
        row = plan.row(i)
        assert len(row.tokens) == len(row.labels) == len(row.loss_mask) == len(row.positions) == L
        bounds = row.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == L and bounds == sorted(set(bounds))
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            assert row.positions[begin:end].tolist() == list(range(end - begin))
        labels += int(row.loss_mask.sum())
    assert plan.efficiency == labels / (len(plan) * L)


def test_a_packed_segment_is_one_document(counting):
    source = counting(EDGES["random"])
    plan = PackedPlan(source, L, seed=1)
    ends = source.first + source.lengths
    for i in range(len(plan)):
        row = plan.row(i)
        for begin, end in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
            if row.loss_mask[begin]:
                assert torch.equal(row.tokens[begin:end] + 1, row.labels[begin:end])
                first, last = int(row.tokens[begin]), int(row.labels[end - 1])
                assert np.searchsorted(ends, first, "right") == np.searchsorted(ends, last, "right")


def test_concatenated_rows_attend_across_documents(counting):
    plan = ConcatenatedPlan(counting([5] * 20), L, seed=0)
    assert [plan.row(i).cu_seqlens.tolist() for i in range(len(plan) - 1)] == [[0, L]] * 6
    assert plan.row(6).cu_seqlens.tolist() == [0, 3, L]  # 99 labels fill 6 rows and 3 positions


@pytest.mark.parametrize("plan_of", [PackedPlan, ConcatenatedPlan])
def test_seed_and_epoch_decide_the_order(counting, plan_of):
    def epoch(seed, number):
        plan = plan_of(counting(EDGES["random"]), L, seed)
        return torch.stack([plan.row(i, number).tokens for i in range(len(plan))])

    assert torch.equal(epoch(0, 2), epoch(0, 2))
    assert not torch.equal(epoch(0, 2), epoch(0, 3))
    assert not torch.equal(epoch(0, 2), epoch(1, 2))


def test_an_epoch_puts_other_documents_together(counting):
    plan = PackedPlan(counting([5] * 400), L, seed=0)
    together = [
        {frozenset(plan.row(i, epoch).tokens[::4].tolist()) for i in range(len(plan))}
        for epoch in (0, 1)
    ]
    assert len(together[0] & together[1]) < 5


@pytest.mark.parametrize("plan_of", [PackedPlan, ConcatenatedPlan])
def test_planning_reads_no_tokens(counting, plan_of):
    source = counting(EDGES["random"])
    plan = plan_of(source, L, seed=0)
    assert len(plan) > 0 and plan.efficiency > 0 and source.reads == 0


def test_packing_is_tight_and_quick(counting):
    lengths = np.random.default_rng(0).lognormal(5, 1, 100_000).astype(int)
    start = time.process_time()
    plan = PackedPlan(counting(lengths), 512, seed=0)
    assert time.process_time() - start < 4
    assert plan.efficiency > 0.99


def test_best_fit_takes_the_fullest_row_with_room():
    assert best_fit(np.array([7, 6, 3, 4, 1]), 10).tolist() == [0, 1, 0, 1, 2]
    assert best_fit(np.array([6, 8, 2, 4]), 10).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("plan_of", [PackedPlan, ConcatenatedPlan])
def test_a_row_needs_a_position(counting, plan_of):
    with pytest.raises(ValueError, match="seq_length is 0"):
        plan_of(counting([5]), 0, seed=0)
