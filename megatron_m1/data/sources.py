"""From the data section of a configuration to readers of training and held-out rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_m1.config import DataConfig, TrainConfig
from megatron_m1.data.corpus import prepare_standard_library
from megatron_m1.data.indexed import IndexedTokens
from megatron_m1.data.reader import Reader
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.errors import InputError

_VALID_FRACTION = 0.05
# The corpus stays the same when a run changes its seed.
_CORPUS_SEED = 0


@dataclass
class Corpus:
    """What a run reads, and the tokenizer it was written with where one is given."""

    train: Reader
    valid: Reader | None
    tokenizer: Tokenizer | None


def open_corpus(data: DataConfig, vocab_size: int, train: TrainConfig, seed: int) -> Corpus:
    """Open the datasets, preparing the standard library's first where they are asked for.

    Raises:
        InputError: a file that is missing, damaged, or of another vocabulary.
    """
    try:
        prefixes, valid, tokenizer = _files(data, vocab_size)
        weights = list(data.weights) or None

        def reader(paths: list[str], weights: list[float] | None) -> Reader:
            sources = [IndexedTokens(path, vocab_size) for path in paths]
            return Reader(sources, train.seq_length, seed, data.pack_documents, weights)

        return Corpus(
            reader(prefixes, weights),
            reader(valid, None) if valid else None,
            Tokenizer.load(tokenizer, data.eod) if tokenizer else None,
        )
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


def _files(data: DataConfig, vocab_size: int) -> tuple[list[str], list[str], str | None]:
    """Prefixes of the training and of the held-out datasets, and the tokenizer."""
    if data.corpus == "indexed":
        return list(data.train), list(data.valid), data.tokenizer
    folder = Path(data.folder)
    prepare_standard_library(
        folder, vocab_size, _CORPUS_SEED, _VALID_FRACTION, data.corpus_bytes, _announce()
    )
    return [str(folder / "train")], [str(folder / "valid")], str(folder)


def _announce() -> Callable[[str], None] | None:
    return print if os.environ.get("RANK", "0") == "0" else None
