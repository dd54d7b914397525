from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_m1.data.indexed import IndexedTokens, IndexedWriter

DOCUMENTS = [[5, 6, 7], [], [8], [9] * 50]


@pytest.fixture
def prefix(tmp_path):
    with IndexedWriter(tmp_path / "pair", vocab_size=100) as writer:
        for document in DOCUMENTS:
            writer.add(document)
    return str(tmp_path / "pair")


def test_what_was_written_is_read(prefix):
    tokens = IndexedTokens(prefix, vocab_size=100)
    assert tokens.name == "pair" and len(tokens) == 4
    assert tokens.lengths.tolist() == [3, 0, 1, 50]
    assert [tokens.document(i).tolist() for i in range(4)] == DOCUMENTS
    assert tokens.read(0, 1, 3).tolist() == [6, 7]


def test_megatron_reads_it_too(prefix):
    dataset = IndexedDataset(prefix)
    assert [sequence.tolist() for sequence in dataset[:]] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_tokens_outlive_the_file_they_are_from(prefix):
    document = IndexedTokens(prefix).document(3)
    gc.collect()
    assert document.tolist() == DOCUMENTS[3]


def test_a_file_that_is_cut_short_while_it_is_read(prefix):
    tokens = IndexedTokens(prefix)
    os.truncate(f"{prefix}.bin", 10)
    assert tokens.document(0).tolist() == DOCUMENTS[0]
    with pytest.raises(ValueError, match="document 3, ends early: the file was cut short while"):
        tokens.document(3)


def test_a_file_that_is_removed_while_it_is_read_is_still_there(prefix):
    tokens = IndexedTokens(prefix)
    os.remove(f"{prefix}.bin")
    assert tokens.document(3).tolist() == DOCUMENTS[3]


@pytest.mark.parametrize("vocab_size, width", [(65_000, 2), (200_064, 4)])
def test_tokens_are_stored_as_small_as_the_vocabulary_allows(tmp_path, vocab_size, width):
    with IndexedWriter(tmp_path / "pair", vocab_size) as writer:
        writer.add(np.array([vocab_size - 1]))
    assert (tmp_path / "pair.bin").stat().st_size == width
    assert IndexedTokens(tmp_path / "pair").document(0).tolist() == [vocab_size - 1]


def test_a_document_of_several_sequences_is_their_concatenation(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "pair.bin"), np.int32)
    for document in ([[1, 2], [3]], [], [[], [4, 5, 6], [7]]):
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "pair.idx"))
    tokens = IndexedTokens(tmp_path / "pair")
    assert tokens.lengths.tolist() == [3, 0, 4]
    assert [tokens.document(i).tolist() for i in range(3)] == [[1, 2, 3], [], [4, 5, 6, 7]]
    assert tokens.read(2, 2, 4).tolist() == [6, 7]


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_file(prefix, suffix):
    os.remove(f"{prefix}.{suffix}")
    with pytest.raises(FileNotFoundError, match=f"pair.{suffix} does not exist"):
        IndexedTokens(prefix)


@pytest.mark.parametrize("size", [2, 106, 109])
def test_a_bin_that_is_too_short_or_long(prefix, size):
    os.truncate(f"{prefix}.bin", size)
    with pytest.raises(ValueError, match=f"pair.bin has {size} bytes but .* 108"):
        IndexedTokens(prefix)


def test_an_empty_bin(prefix):
    os.truncate(f"{prefix}.bin", 0)
    with pytest.raises(ValueError, match="pair.bin holds no tokens"):
        IndexedTokens(prefix)


@pytest.mark.parametrize("size", [0, 20, 60])
def test_a_truncated_index(prefix, size):
    os.truncate(f"{prefix}.idx", size)
    with pytest.raises(ValueError, match="pair.idx (is not a Megatron index|has 60 bytes)"):
        IndexedTokens(prefix)


def test_an_index_without_documents(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "pair.bin"))
    builder.finalize(str(tmp_path / "pair.idx"))
    with pytest.raises(ValueError, match="pair.idx lists no documents"):
        IndexedTokens(tmp_path / "pair")


def test_reading_outside_the_vocabulary(prefix):
    tokens = IndexedTokens(prefix, vocab_size=9)
    assert tokens.document(0).tolist() == [5, 6, 7]
    with pytest.raises(ValueError, match="document 3, has token id 9, outside a vocabulary of 9"):
        tokens.document(3)


def test_the_fingerprint_follows_the_content_and_not_the_place(prefix, tmp_path):
    here = IndexedTokens(prefix).fingerprint
    for suffix in ("bin", "idx"):
        shutil.copy(f"{prefix}.{suffix}", tmp_path / f"moved.{suffix}")
    assert IndexedTokens(tmp_path / "moved").fingerprint == here
    with IndexedWriter(prefix, vocab_size=100) as writer:
        for document in [*DOCUMENTS[:-1], [9] * 49 + [10]]:
            writer.add(document)
    assert IndexedTokens(prefix).fingerprint != here


@pytest.mark.parametrize("token", [-1, 100, 70_000])
def test_writing_outside_the_vocabulary_leaves_nothing(tmp_path, token):
    with (
        pytest.raises(ValueError, match=f"document 1 for .*pair has token id {token}"),
        IndexedWriter(tmp_path / "pair", vocab_size=100) as writer,
    ):
        writer.add([1, 2])
        writer.add([3, token])
    assert list(tmp_path.iterdir()) == []


def test_writing_no_tokens_leaves_nothing(tmp_path):
    with (
        pytest.raises(ValueError, match="nothing to write under .*pair"),
        IndexedWriter(tmp_path / "pair", vocab_size=100) as writer,
    ):
        writer.add([])
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_the_pair_that_was_there(prefix):
    with pytest.raises(KeyboardInterrupt), IndexedWriter(prefix, vocab_size=100) as writer:
        writer.add([1])
        raise KeyboardInterrupt
    assert IndexedTokens(prefix).document(0).tolist() == DOCUMENTS[0]


def write_and_die(prefix: str) -> None:
    with IndexedWriter(prefix, vocab_size=100) as writer:
        writer.add([1] * 100_000)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_no_final_file(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=write_and_die, args=(str(tmp_path / "pair"),)
    )
    process.start()
    process.join(timeout=20)
    assert process.exitcode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [f"pair.bin.partial-{process.pid}"]
