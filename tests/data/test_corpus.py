from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time

import pytest

from megatron_m1.data import corpus
from megatron_m1.data.corpus import prepare_standard_library, standard_library_documents
from megatron_m1.data.indexed import IndexedTokens
from megatron_m1.data.tokenizer import Tokenizer

SMALL = {"vocab_size": 300, "max_bytes": 150_000, "valid_fraction": 0.1}


def test_documents_are_sources_and_texts_without_tests():
    documents = standard_library_documents()
    names = [document.name for document in documents]
    assert "json/decoder.py" in names and "pydoc_data.topics/lambda" in names
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.split("/"))]
    assert len(set(names)) == len(names)
    assert sum(len(document.text) for document in documents) > 5e6
    assert documents == standard_library_documents()


def test_max_bytes_takes_a_sample_that_fits():
    documents = standard_library_documents(100_000)
    size = sum(len(document.text.encode()) for document in documents)
    assert 50_000 < size <= 100_000
    assert len({document.name[0] for document in documents}) > 3


def test_prepare_writes_a_corpus_once(tmp_path):
    messages = []
    manifest = prepare_standard_library(tmp_path, **SMALL, progress=messages.append)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == [
        *("manifest.json", "tokenizer.json", "train.bin", "train.idx", "valid.bin", "valid.idx")
    ]
    tokenizer = Tokenizer.load(tmp_path)
    assert manifest.python == platform.python_version()
    assert manifest.tokenizer_sha256 == tokenizer.sha256
    texts = set()
    for part in ("train", "valid"):
        tokens = IndexedTokens(tmp_path / part, tokenizer.vocab_size)
        assert manifest.documents[part] == len(tokens) > 0
        assert manifest.tokens[part] == tokens.lengths.sum()
        documents = [tokens.document(i).tolist() for i in range(len(tokens))]
        assert {document[-1] for document in documents} == {tokenizer.eod}
        texts |= {tokenizer.decode(document[:-1]) for document in documents}
    assert texts == {document.text for document in standard_library_documents(150_000)}

    told = len(messages)
    start = time.monotonic()
    assert prepare_standard_library(tmp_path, **SMALL, progress=messages.append) == manifest
    assert time.monotonic() - start < 0.5 and 0 < told == len(messages)


def test_the_seed_picks_the_validation_documents(tmp_path):
    def valid(name, seed):
        prepare_standard_library(tmp_path / name, **SMALL, seed=seed)
        tokens = IndexedTokens(tmp_path / name / "valid")
        tokenizer = Tokenizer.load(tmp_path / name)
        return {tokenizer.decode(tokens.document(i)) for i in range(len(tokens))}

    assert valid("a", 0) == valid("b", 0) != valid("c", 1)


def test_other_arguments_for_a_prepared_folder_are_refused(tmp_path):
    prepare_standard_library(tmp_path, **SMALL)
    with pytest.raises(ValueError, match="vocab_size 300, and 400 is asked for"):
        prepare_standard_library(tmp_path, **SMALL | {"vocab_size": 400})


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_unfit_arguments(tmp_path, fraction):
    with pytest.raises(ValueError, match="valid_fraction is"):
        prepare_standard_library(tmp_path, valid_fraction=fraction)
    with pytest.raises(ValueError, match="raise max_bytes"):
        prepare_standard_library(tmp_path, max_bytes=0)
    assert not (tmp_path / "manifest.json").exists()


def test_an_interrupted_preparation_starts_again(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus, "_encode", fail)
        prepare_standard_library(tmp_path, **SMALL)
    assert not (tmp_path / "train.idx").exists()
    assert prepare_standard_library(tmp_path, **SMALL).documents["train"] > 0


def prepare_and_report(folder: str, barrier, reports) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    messages: list[str] = []
    barrier.wait()
    manifest = prepare_standard_library(folder, **SMALL, progress=messages.append)
    reports.put((json.dumps(manifest.tokens), len(messages) > 0))


def test_processes_preparing_at_once_do_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, reports = context.Barrier(3), context.Queue()
    arguments = (str(tmp_path), barrier, reports)
    processes = [context.Process(target=prepare_and_report, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    tokens, worked = zip(*(reports.get(timeout=20) for _ in processes), strict=True)
    for process in processes:
        process.join(timeout=20)
    assert len(set(tokens)) == 1 and sum(worked) == 1
