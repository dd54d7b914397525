"""How rows are cut, without any process."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch

from parallel.cut import Cut
from parallel.layout import CUTS
from tests.parallel.rows import LENGTHS, borders

RANKS = (1, 2, 4)

each_cut = pytest.mark.parametrize("kind", CUTS)
each_row = pytest.mark.parametrize("name", LENGTHS)
each_size = pytest.mark.parametrize("ranks", RANKS)


@each_cut
@each_row
@each_size
def test_join_is_the_inverse_of_take(kind: str, name: str, ranks: int) -> None:
    cut = Cut.of(borders(name), ranks, kind)
    row = torch.arange(3 * cut.bounds[-1]).view(3, -1)
    local_rows = [cut.take(row, rank, dim=1) for rank in range(ranks)]
    assert {part.shape for part in local_rows} == {(3, cut.local_tokens)}
    assert torch.equal(cut.join(local_rows, dim=1), row)


@each_cut
@each_row
@each_size
def test_segments_are_the_parts_of_documents_in_pieces(kind: str, name: str, ranks: int) -> None:
    bounds = borders(name)
    cut = Cut.of(bounds, ranks, kind)
    document = torch.arange(len(bounds) - 1).repeat_interleave(torch.tensor(bounds).diff())
    token = torch.arange(bounds[-1])
    for rank in range(ranks):
        local = cut.local_bounds(rank)
        assert local[0] == 0 and local[-1] == cut.local_tokens
        for begin, end in zip(local, local[1:], strict=False):
            here = slice(begin, end)
            assert len(cut.take(document, rank)[here].unique()) == 1
            assert torch.equal(
                cut.take(token, rank)[here].diff(), torch.ones(end - begin - 1, dtype=torch.int64)
            )


@each_cut
@each_row
@each_size
def test_work_is_the_number_of_pairs(kind: str, name: str, ranks: int) -> None:
    bounds = borders(name)
    cut = Cut.of(bounds, ranks, kind)
    position = torch.cat([torch.arange(length) for length in LENGTHS[name]])
    assert cut.work == [int(cut.take(position + 1, rank).sum()) for rank in range(ranks)]


def test_where_the_pieces_are() -> None:
    assert [(p.rank, p.begin, p.end) for p in Cut.of([0, 12], 3, "contiguous").pieces] == [
        (0, 0, 4),
        (1, 4, 8),
        (2, 8, 12),
    ]
    # The last rank's two pieces are neighbours, hence one.
    assert [(p.rank, p.begin, p.end) for p in Cut.of([0, 12], 2, "zigzag").pieces] == [
        (0, 0, 3),
        (1, 3, 9),
        (0, 9, 12),
    ]


def test_documents_that_no_rank_must_share_are_left_whole() -> None:
    assert Cut.of(borders("all_local"), 4).crossings == ()
    assert Cut.of(borders("one_token_each"), 4).crossings == ()


def skewed_rows(tokens: int) -> list[list[int]]:
    """Borders of rows with lognormal lengths, and of one giant among small documents."""
    random = np.random.RandomState(0)
    rows = []
    for sigma in (1.0, 2.0) * 5:
        lengths = random.lognormal(np.log(tokens / 100), sigma, size=tokens).astype(int) + 1
        ends = np.cumsum(lengths)
        rows.append([0, *ends[ends < tokens].tolist(), tokens])
    for giant in (tokens // 4, tokens // 2, 9 * tokens // 10) * 4:
        small = [16] * ((tokens - giant) // 16)
        place = random.randint(len(small) + 1)
        rows.append([0, *accumulate([*small[:place], tokens - sum(small), *small[place:]])])
    return rows


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_balanced_ranks_differ_by_less_than_two_percent(ranks: int) -> None:
    tokens = 1024 * ranks
    for bounds in skewed_rows(tokens):
        cut = Cut.of(bounds, ranks)
        assert cut.imbalance < 1.02
        assert min(cut.work) * ranks > 0.98 * sum(cut.work)
        assert len(cut.pieces) <= 2 * ranks - 1


def test_other_cuts_are_as_unbalanced_as_they_are_known_to_be() -> None:
    one_document = [0, 4096]
    assert Cut.of(one_document, 4, "contiguous").imbalance == pytest.approx(1.75, rel=1e-3)
    assert Cut.of(one_document, 4, "zigzag").imbalance == pytest.approx(1, rel=1e-3)
    half_a_row_last = [*range(0, 2048, 16), 2048, 4096]
    assert Cut.of(half_a_row_last, 4, "zigzag").imbalance > 1.7


def test_errors_name_the_numbers() -> None:
    with pytest.raises(
        ValueError, match="10 tokens cannot be cut balanced over 4 .* multiple of 4"
    ):
        Cut.of([0, 10], 4)
    with pytest.raises(ValueError, match="12 tokens cannot be cut zigzag over 4 .* multiple of 8"):
        Cut.of([0, 12], 4, "zigzag")
    with pytest.raises(ValueError, match="balanced, contiguous, zigzag, got 'striped'"):
        Cut.of([0, 12], 4, "striped")


def test_documents_of_length_zero_are_left_out() -> None:
    assert Cut.of([0, 0, 4, 4, 8, 8], 2, "contiguous").bounds == (0, 4, 8)
