from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_m1.data.reader import Reader

L = 16
LENGTHS = np.random.default_rng(0).integers(0, 3 * L, 60).tolist()


@pytest.fixture(params=[True, False], ids=["packed", "concatenated"])
def make(request, counting):
    def make(lengths=LENGTHS, **options):
        options = {"seq_length": L, "seed": 7, "pack_documents": request.param} | options
        return Reader([counting(lengths)], **options)

    return make


def test_random_access_equals_the_sequence_over_epochs(make):
    many = 3 * len(make().plans[0]) + 2
    reader = make()
    forwards = [reader.sample(i).tokens for i in range(many)]
    for i in np.random.default_rng(1).permutation(many):
        assert torch.equal(make().sample(int(i)).tokens, forwards[i])


def test_epochs_hold_the_same_labels_in_other_orders(make):
    reader = make()
    rows = len(reader.plans[0])
    epochs = [
        torch.cat([reader.sample(e * rows + i).labels for i in range(rows)]) for e in range(2)
    ]
    assert not torch.equal(*epochs)
    if reader.state_dict()["pack_documents"]:
        assert torch.equal(*(epoch.sort().values for epoch in epochs))


@pytest.mark.parametrize("micro_batch, data_size", [(1, 1), (12, 1), (1, 12), (2, 3), (3, 2)])
def test_ranks_share_a_global_batch_without_loss_or_repeat(make, micro_batch, data_size):
    reader = make()
    consumed, global_batch = 29, 12
    shares = [
        list(reader.micro_batches(consumed, global_batch, micro_batch, rank, data_size))
        for rank in range(data_size)
    ]
    assert {len(share) for share in shares} == {global_batch // (micro_batch * data_size)}
    assert {len(row) for share in shares for row in share} == {micro_batch * L}
    samples = [part for share in shares for row in share for part in row.tokens.split(L)]
    expected = [reader.sample(consumed + i).tokens for i in range(global_batch)]
    assert sorted(map(torch.Tensor.tolist, samples)) == sorted(map(torch.Tensor.tolist, expected))


def test_a_micro_batch_keeps_the_segments_of_its_samples(make):
    reader = make()
    (row,) = reader.micro_batches(4, 3, 3, 0, 1)
    bounds = [
        int(bound) + i * L for i in range(3) for bound in reader.sample(4 + i).cu_seqlens[:-1]
    ]
    assert row.cu_seqlens.tolist() == [*bounds, 3 * L]


@pytest.mark.parametrize("sizes", [(10, 4, 1), (12, 5, 2), (0, 1, 1), (4, 0, 1)])
def test_uneven_batches_are_refused(make, sizes):
    global_batch, micro_batch, data_size = sizes
    with pytest.raises(ValueError, match=f"global batch of {global_batch}"):
        make().micro_batches(0, global_batch, micro_batch, 0, data_size)


def test_a_rank_outside_is_refused(make):
    with pytest.raises(ValueError, match="data rank 2 is outside 0 to 1"):
        make().micro_batches(0, 4, 1, 2, 2)


def test_resume_goes_on_where_it_stopped(make):
    reader = make()
    reader.consumed += 24
    state = json.loads(json.dumps(reader.state_dict()))
    resumed = make()
    resumed.load_state_dict(state)
    assert resumed.consumed == 24
    for here, there in zip(
        reader.micro_batches(reader.consumed, 8, 2, 1, 2),
        resumed.micro_batches(resumed.consumed, 8, 2, 1, 2),
        strict=True,
    ):
        assert torch.equal(here.tokens, there.tokens)


def test_resume_with_other_data_is_refused_by_name(make, counting):
    state = make().state_dict()
    for name, value in (("seed", 8), ("seq_length", 32)):
        with pytest.raises(ValueError, match=f"has {name} .* this run has {value}"):
            make(**{name: value}).load_state_dict(state)
    with pytest.raises(ValueError, match="pack_documents"):
        make(pack_documents=not state["pack_documents"]).load_state_dict(state)
    with pytest.raises(ValueError, match="data source counting"):
        make([*LENGTHS, 5]).load_state_dict(state)


def test_resume_with_other_sources_or_weights_is_refused(counting):
    def blend(names, weights):
        return Reader([counting(LENGTHS, name) for name in names], L, 0, weights=weights)

    state = blend(["code", "text"], [1, 2]).state_dict()
    with pytest.raises(ValueError, match="weights"):
        blend(["code", "text"], [2, 2]).load_state_dict(state)
    with pytest.raises(ValueError, match="data source text .* as code"):
        blend(["text", "code"], [1, 2]).load_state_dict(state)


def test_blended_sources_roll_through_their_own_epochs(counting):
    short, long = counting([L + 1] * 3, "short"), counting([L + 1] * 30, "long")
    reader = Reader([short, long], L, seed=0, weights=[1, 1])
    samples = [tuple(reader.sample(i).labels.tolist()) for i in range(60)]
    of_short = {tuple(range(k * (L + 1) + 1, (k + 1) * (L + 1))) for k in range(3)}
    # Ten epochs of `short`, and one of `long`, which starts with the same tokens.
    assert sum(sample in of_short for sample in samples) == 10 * 3 + 3
    assert len(set(samples)) == 30


def test_sources_that_cannot_be_read_from(counting):
    with pytest.raises(ValueError, match="data source poor has no token to predict"):
        Reader([counting([0, 1], "poor")], L, seed=0)
    with pytest.raises(ValueError, match="2 weights were given for 1 data sources"):
        Reader([counting([5])], L, seed=0, weights=[1, 2])
    with pytest.raises(ValueError, match="blend weights"):
        Reader([], L, seed=0)
