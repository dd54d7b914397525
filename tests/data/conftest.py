from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from megatron_m1.data.tokenizer import Tokenizer, train_bpe


class CountingSource:
    """Documents of given lengths whose tokens are 0, 1, 2, ... through the whole source, so that a
    token tells its document and its place."""

    def __init__(self, lengths: Sequence[int], name: str = "counting") -> None:
        self.name = name
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.fingerprint = f"{name} {list(lengths)}"
        self.first = np.cumsum(self.lengths) - self.lengths
        self.reads = 0

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.lengths[document]
        self.reads += 1
        return np.arange(start, stop, dtype=np.int64) + int(self.first[document])


@pytest.fixture
def counting() -> Callable[..., CountingSource]:
    return CountingSource


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(["the quick brown fox jumps over the lazy dog"] * 9, vocab_size=280)
