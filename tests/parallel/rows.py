"""Packed rows whose documents a cut may catch in every way; used by the tests of cut rows."""

from __future__ import annotations

from itertools import accumulate

LENGTHS = {
    "skewed": [1, 2, 1, 3, 1, 1, 29, 5, 1, 2, 17, 1],
    "shorter_than_the_group": [2, 1, 1, 2, 1, 1],
    "one_token_each": [1] * 16,
    "one_document": [48],
    "aligned_borders": [8, 8, 16, 8, 8],
    "all_local": [16, 16, 16, 16],
    "giant_last": [3, 1, 2, 2, 40],
    "giant_first": [40, 3, 1, 2, 2],
    "two_giants": [22, 1, 21, 4],
}


def borders(name: str) -> list[int]:
    """Document borders of one of the rows, all multiples of 8 tokens long."""
    return [0, *accumulate(LENGTHS[name])]
