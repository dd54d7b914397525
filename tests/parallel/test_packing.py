from __future__ import annotations

import pytest
import torch

from parallel.layout import CUTS
from parallel.packing import PackedRow, concatenate


def documents(*lengths: int) -> list[torch.Tensor]:
    return [torch.arange(1, length + 1) for length in lengths]


def test_without_labels_a_document_predicts_its_own_next_token():
    row = PackedRow.from_documents(documents(3, 0, 1, 2), pad_to=8)
    assert row.tokens.tolist() == [1, 2, 3, 1, 1, 2, 0, 0]
    assert row.labels.tolist() == [2, 3, 0, 0, 2, 0, 0, 0]
    assert row.loss_mask.tolist() == [1, 1, 0, 0, 1, 0, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 0, 0, 1, 0, 1]
    assert row.cu_seqlens.tolist() == [0, 3, 4, 6, 8]
    assert row.max_seqlen == 3 and len(row) == 8


def test_with_labels_every_position_counts():
    row = PackedRow.from_documents(
        documents(2, 1), labels=[torch.tensor([7, 8]), torch.tensor([9])]
    )
    assert row.labels.tolist() == [7, 8, 9] and row.loss_mask.tolist() == [1, 1, 1]
    assert row.cu_seqlens.tolist() == [0, 2, 3]


def test_dtypes():
    row = PackedRow.from_documents(documents(2), pad_to=3)
    assert row.tokens.dtype == row.labels.dtype == row.positions.dtype == torch.int64
    assert row.loss_mask.dtype == torch.float32
    assert row.cu_seqlens.dtype == row.cu_seqlens_host.dtype == torch.int32


def test_a_row_may_be_padding_only_but_not_empty():
    row = PackedRow.from_documents([], pad_to=4)
    assert row.cu_seqlens.tolist() == [0, 4] and row.loss_mask.sum() == 0
    with pytest.raises(ValueError, match="at least one token"):
        PackedRow.from_documents(documents(0))


def test_documents_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="5 tokens in all do not fit a row of pad_to=4"):
        PackedRow.from_documents(documents(3, 2), pad_to=4)
    with pytest.raises(ValueError, match=r"labels of lengths \[1\].*lengths \[2\]"):
        PackedRow.from_documents(documents(2), labels=documents(1))


def test_concatenate_is_the_same_as_packing_at_once():
    joined = concatenate(
        [PackedRow.from_documents(documents(*lengths)) for lengths in ([3, 1], [2], [4, 2])]
    )
    at_once = PackedRow.from_documents(documents(3, 1, 2, 4, 2))
    for name in ("tokens", "labels", "loss_mask", "positions", "cu_seqlens", "cu_seqlens_host"):
        assert torch.equal(getattr(joined, name), getattr(at_once, name)), name
    assert joined.max_seqlen == at_once.max_seqlen
    assert joined.cu_seqlens.dtype == torch.int32


def test_concatenate_keeps_the_padding_between_rows():
    row = PackedRow.from_documents(documents(2), pad_to=3)
    assert concatenate([row, row]).cu_seqlens.tolist() == [0, 2, 3, 5, 6]
    with pytest.raises(ValueError, match="no rows"):
        concatenate([])


def test_to_moves_all_but_the_host_copy():
    moved = PackedRow.from_documents(documents(2, 3)).to("meta")
    assert {moved.tokens.device.type, moved.loss_mask.device.type} == {"meta"}
    assert moved.cu_seqlens.device.type == "meta"
    assert moved.cu_seqlens_host.tolist() == [0, 2, 5]
    assert concatenate([moved, moved]).cu_seqlens_host.tolist() == [0, 2, 5, 7, 10]


def test_padding_to_a_multiple_is_a_masked_segment():
    row = PackedRow.from_documents(documents(3, 2)).padded(4)
    assert len(row) == 8 and row.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert row.loss_mask[5:].sum() == 0
    assert row.padded(4) is row


@pytest.mark.parametrize("kind", CUTS)
def test_the_parts_of_a_cut_row_put_together_are_the_row(kind: str):
    row = PackedRow.from_documents(documents(1, 9, 2, 1, 7)).padded(8)
    parts = [row.cut(4, rank, kind) for rank in range(4)]
    cut = parts[0].shard.cut
    for name in ("tokens", "labels", "loss_mask", "positions"):
        joined = cut.join([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(row, name)), name
    for part in parts:
        assert len(part) == 6 and part.whole_length == len(row) == 24
        assert part.document_bounds.tolist() == row.document_bounds.tolist()
        assert part.cu_seqlens.tolist() == part.shard.ring.bounds == part.shard.states.bounds
        assert part.cu_seqlens.dtype == part.cu_seqlens_host.dtype == torch.int32


def test_a_cut_document_keeps_its_positions_and_labels():
    row = PackedRow.from_documents(documents(2, 6))
    part = row.cut(2, 1, "contiguous")
    assert part.positions.tolist() == [2, 3, 4, 5]
    assert part.labels.tolist() == [4, 5, 6, 0]
    assert part.cu_seqlens.tolist() == [0, 4] and part.max_seqlen == 4
