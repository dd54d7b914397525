"""Tokenised documents on disk, in Megatron's `.bin` (tokens) and `.idx` (lengths) pair.

The files are Megatron's to the byte; this module adds checks that name what is wrong, and writing
that leaves either a whole pair or none.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from numpy.typing import NDArray

_MAGIC = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1)  # the second part is the format's version
_HEADER = struct.Struct("<17sBQQ")  # magic, dtype code, sequences, document borders
_EDGE_BYTES = 1 << 16


class IndexedTokens:
    """The documents under `prefix`; only what is read comes into memory. The tokens are not mapped
    as the index is: where a mapped file is cut short, the system kills who reads it.

    name         the prefix's last part, for messages
    lengths      [documents] int64, tokens in each
    fingerprint  sha256 of the lengths and of both ends of the tokens; a moved file keeps its own

    With `vocab_size`, reading a token outside the vocabulary raises ValueError.
    Raises FileNotFoundError for a missing file, ValueError for a damaged or empty pair, and when
    read OSError or ValueError for tokens that are no longer there.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None = None) -> None:
        self.prefix, self.name, self._vocab_size = str(prefix), Path(prefix).name, vocab_size
        _check_index(Path(f"{prefix}.idx"))
        self._check_bin_is_there()
        self._dataset = IndexedDataset(self.prefix)
        sequences = self._dataset.sequence_lengths
        first_token = np.concatenate([[0], np.cumsum(sequences, dtype=np.int64)])
        self._first_sequence = self._dataset.document_indices[:-1]
        self.lengths = np.diff(first_token[self._dataset.document_indices])
        self._check_bin_size(int(first_token[-1]))
        self.fingerprint = self._fingerprint()
        self._bin = open(f"{prefix}.bin", "rb", buffering=0)  # noqa: SIM115

    def __len__(self) -> int:
        """Documents."""
        return len(self.lengths)

    def document(self, index: int) -> NDArray[np.int64]:
        """All tokens of a document, its sequences joined: [tokens] int64."""
        return self.read(index, 0, int(self.lengths[index]))

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of a document: [stop - start] int64."""
        if stop <= start:
            return np.empty(0, dtype=np.int64)
        index = self._dataset.index
        size = np.dtype(index.dtype).itemsize
        # Megatron writes a document's sequences one after the other, so one read spans them.
        first = int(index.sequence_pointers[self._first_sequence[document]]) + start * size
        data = os.pread(self._bin.fileno(), (stop - start) * size, first)
        if len(data) < (stop - start) * size:
            raise ValueError(
                f"{self.prefix}.bin, document {document}, ends early: the file was cut short while "
                "it was read; write the pair again"
            )
        tokens = np.frombuffer(data, index.dtype)
        if self._vocab_size is not None:
            check_vocabulary(tokens, self._vocab_size, f"{self.prefix}.bin, document {document},")
        return tokens.astype(np.int64)

    def _check_bin_is_there(self) -> None:
        path = Path(f"{self.prefix}.bin")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, though {self.prefix}.idx does")
        if not path.stat().st_size:
            raise ValueError(f"{path} holds no tokens")

    def _check_bin_size(self, tokens: int) -> None:
        expected = tokens * np.dtype(self._dataset.index.dtype).itemsize
        found = Path(f"{self.prefix}.bin").stat().st_size
        if found != expected:
            raise ValueError(
                f"{self.prefix}.bin has {found} bytes but its index speaks of {expected}: the file "
                "was cut short or belongs to another index; write the pair again"
            )

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(np.dtype(self._dataset.index.dtype).str.encode())
        digest.update(self.lengths.tobytes())
        with open(f"{self.prefix}.bin", "rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(0, file.seek(0, os.SEEK_END) - _EDGE_BYTES))
            digest.update(file.read())
        return digest.hexdigest()


class IndexedWriter:
    """Writes a pair. Files get their final names when the `with` block ends without an error.

        with IndexedWriter("corpus/train", vocab_size=8192) as writer:
            writer.add([5, 17, 2])

    Raises ValueError for a token outside the vocabulary, and at the end for no tokens at all.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self._prefix, self._vocab_size = str(prefix), vocab_size
        self._bin, self._idx = (
            Path(f"{prefix}.{kind}.partial-{os.getpid()}") for kind in ("bin", "idx")
        )
        self._dtype = DType.optimal_dtype(vocab_size)
        self.documents = 0
        self.tokens = 0

    def __enter__(self) -> IndexedWriter:
        self._bin.parent.mkdir(parents=True, exist_ok=True)
        self._builder = IndexedDatasetBuilder(str(self._bin), self._dtype)
        return self

    def add(self, tokens: Sequence[int] | NDArray[np.integer]) -> None:
        """Append a document."""
        array = np.asarray(tokens, dtype=np.int64)
        check_vocabulary(array, self._vocab_size, f"document {self.documents} for {self._prefix}")
        self._builder.add_item(torch.from_numpy(array))
        self._builder.end_document()
        self.documents += 1
        self.tokens += len(array)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._builder.finalize(str(self._idx))
            if error is None:
                self._publish()
        finally:
            self._bin.unlink(missing_ok=True)
            self._idx.unlink(missing_ok=True)

    def _publish(self) -> None:
        if not self.tokens:
            raise ValueError(f"nothing to write under {self._prefix}: the documents hold no tokens")
        # An old index must not be seen beside new tokens.
        Path(f"{self._prefix}.idx").unlink(missing_ok=True)
        os.replace(self._bin, f"{self._prefix}.bin")
        os.replace(self._idx, f"{self._prefix}.idx")


def check_vocabulary(tokens: NDArray[np.integer], vocab_size: int, where: str) -> None:
    """Raise ValueError, saying where, unless every token id is in [0, vocab_size)."""
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise ValueError(
            f"{where} has token id {wrong}, outside a vocabulary of {vocab_size}: the tokens come "
            "from another tokenizer"
        )


def _check_index(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a dataset is a .bin and an .idx file")
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise ValueError(f"{path} is not a Megatron index: it starts with {head[:17]!r}")
    _, _, sequences, borders = _HEADER.unpack(head)
    expected = _HEADER.size + (4 + 8) * sequences + 8 * borders
    if path.stat().st_size < expected:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes but its header speaks of {expected}: the file "
            "was cut short; write the pair again"
        )
    if not sequences or borders < 2:
        raise ValueError(f"{path} lists no documents")
