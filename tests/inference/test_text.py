"""Texts that grow token by token, and the tokenizer that they need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_m1.data.tokenizer import END_OF_DOCUMENT, train_bpe
from megatron_m1.errors import InputError
from megatron_m1.inference.generation import Generator
from megatron_m1.inference.load import Loaded, load_tokenizer
from megatron_m1.inference.requests import SamplingParams, Sequence
from megatron_m1.inference.text import continue_text
from megatron_m1.model.build import build_chunks
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout
from tests.training import small_run

MODEL = replace(small_run.MODEL, num_layers=2, layer_pattern="LS", vocab_size=300)
TOKENIZER = train_bpe(["naïve"], 300)


@pytest.fixture
def untrained(single_process: Layout) -> Loaded:
    return Loaded(MODEL, build_chunks(MODEL, transformer_config(MODEL, Layout()), seed=1), Path())


def tokens_after(loaded: Loaded, prompt: list[int], sampling: SamplingParams, seed: int) -> list:
    generator = Generator(loaded.chunks, stop_token=TOKENIZER.eod)
    return list(generator.tokens(Sequence(tuple(prompt), sampling, seed)))


def test_text_comes_in_whole_characters(untrained: Loaded) -> None:
    """An untrained model writes bytes at random, so that characters are cut and broken off."""
    sampling = SamplingParams(max_new_tokens=12)
    ids = tokens_after(untrained, TOKENIZER.encode("ü"), sampling, 2)
    pieces = list(continue_text(untrained.chunks, TOKENIZER, "ü", sampling, 2))
    assert TOKENIZER.eod not in ids
    assert len(pieces) == len(ids) + 1
    assert "".join(pieces) == TOKENIZER.decode(ids)


def test_an_empty_prompt_starts_a_document(untrained: Loaded) -> None:
    sampling = SamplingParams(temperature=0, max_new_tokens=5)
    ids = tokens_after(untrained, [TOKENIZER.eod], sampling, 0)
    pieces = continue_text(untrained.chunks, TOKENIZER, "", sampling)
    assert "".join(pieces) == TOKENIZER.decode(ids)


def test_the_end_of_the_document_is_not_text(untrained: Loaded) -> None:
    sampling = SamplingParams(temperature=2, max_new_tokens=2000)
    ids = tokens_after(untrained, [1, 2], sampling, 3)
    assert ids.index(TOKENIZER.eod) == len(ids) - 1 < 1999
    prompt = TOKENIZER.decode([1, 2])
    assert TOKENIZER.encode(prompt) == [1, 2]
    pieces = continue_text(untrained.chunks, TOKENIZER, prompt, sampling, 3)
    assert "".join(pieces) == TOKENIZER.decode(ids[:-1])


def test_the_tokenizer_must_be_the_models(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    loaded = Loaded(MODEL, [], tmp_path)
    size = load_tokenizer(None, END_OF_DOCUMENT, loaded).vocab_size
    with pytest.raises(InputError, match=f"has {size} tokens, but the checkpoint's model knows 9"):
        load_tokenizer(None, END_OF_DOCUMENT, replace(loaded, model=replace(MODEL, vocab_size=9)))
    with pytest.raises(InputError, match="tokenizer=.*none.json does not exist"):
        load_tokenizer(str(tmp_path / "none.json"), END_OF_DOCUMENT, loaded)
    with pytest.raises(InputError, match="no token <eos> to end a document with"):
        load_tokenizer(None, "<eos>", loaded)
