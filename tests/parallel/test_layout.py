"""The arithmetic of degrees and its messages."""

from __future__ import annotations

import pytest

from parallel.layout import Layout


def test_factors_of_the_world() -> None:
    layout = Layout(tp=2, pp=4, ep=8, etp=1)
    assert layout.model_size == 8
    assert layout.smallest_world == 32
    assert layout.data_parallel(64) == 8
    assert layout.expert_data_parallel(64) == 2
    assert layout.problems(64) == []


def test_sequence_parallelism_follows_tp_unless_told() -> None:
    assert not Layout().uses_sequence_parallel
    assert Layout(tp=2).uses_sequence_parallel
    assert not Layout(tp=2, sequence_parallel=False).uses_sequence_parallel


@pytest.mark.parametrize(
    ("layout", "world", "words"),
    [
        (Layout(tp=2, pp=3), 8, "tp*cp*pp = 2*1*3 = 6"),
        (Layout(ep=4), 6, "etp*ep*pp = 1*4*1 = 4"),
        (Layout(tp=0), 1, "parallel.tp=0"),
        (Layout(cp=4, tp=2), 12, "tp*cp*pp = 2*4*1 = 8"),
        (Layout(cp=2, cp_cut="striped"), 2, "parallel.cp_cut=striped"),
        (Layout(vpp=2), 1, "parallel.vpp=2"),
        (Layout(sequence_parallel=True), 1, "sequence_parallel"),
    ],
)
def test_problems_name_the_numbers(layout: Layout, world: int, words: str) -> None:
    (problem, *_) = layout.problems(world)
    assert words in problem


def test_rows_are_padded_so_that_ranks_hold_equally_many_tokens() -> None:
    assert Layout(tp=4, cp_cut="zigzag").row_multiple == 4
    assert Layout(cp=4).row_multiple == 4
    assert Layout(cp=4, cp_cut="zigzag").row_multiple == 8
    assert Layout(cp=4, tp=3, cp_cut="zigzag").row_multiple == 24


def test_description_shows_every_factor() -> None:
    text = Layout(tp=2, pp=2, ep=2).describe(8)
    assert "pp 2 x dp 2 x cp 1 x tp 2" in text
    assert "pp 2 x edp 2 x ep 2 x etp 1" in text
