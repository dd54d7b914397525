from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from megatron_m1.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_bpe

TEXTS = ["the quick fox", "naïve 你好 😀\n\t  end", "\x00 \u2028 �", "", "a" * 300]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_learns_merges_and_numbers_tokens_from_the_special_ones(tokenizer):
    assert tokenizer.vocab_size == 280
    assert tokenizer.eod == 0
    assert len(tokenizer.encode("the quick brown")) < len("the quick brown")


def test_training_is_deterministic(tokenizer):
    again = train_bpe(["the quick brown fox jumps over the lazy dog"] * 9, vocab_size=280)
    assert again.sha256 == tokenizer.sha256


def test_few_texts_make_a_smaller_vocabulary():
    assert train_bpe(["ab"], vocab_size=5000).vocab_size < 300


def test_a_batch_is_its_texts(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_spelled_special_tokens_are_text_when_asked(tokenizer):
    text = f"a{END_OF_DOCUMENT}b"
    assert tokenizer.eod in tokenizer.encode(text)
    plain = tokenizer.encode(text, parse_special=False)
    assert tokenizer.eod not in plain and tokenizer.decode(plain) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == "ab"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.sha256 == tokenizer.sha256 and loaded.eod == tokenizer.eod
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tokenizer.json"]


def test_another_name_for_the_end_of_document(tmp_path):
    train_bpe(["text"], 300, ["<s>", "[e~["]).save(tmp_path)
    with pytest.raises(ValueError, match=r"no token <\|endoftext\|>.*<s>, \[e~\["):
        Tokenizer.load(tmp_path)
    assert Tokenizer.load(tmp_path, eod_token="[e~[").eod == 1


def test_a_post_processor_adds_nothing(tmp_path):
    from tokenizers.processors import TemplateProcessing

    backend = Backend(models.BPE(vocab={"<s>": 0, "a": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert Tokenizer(backend, "<s>").encode("a") == [1]


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_unfit_training_arguments():
    with pytest.raises(ValueError, match="vocab_size is 256.*at least 257"):
        train_bpe(["a"], 256)
    with pytest.raises(ValueError, match="special_tokens is empty"):
        train_bpe(["a"], 300, [])


def streamed(tokenizer: Tokenizer, tokens: list[int], **options: bool) -> list[str]:
    stream = tokenizer.decode_stream(**options)
    return [*(stream.step(token) for token in tokens), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_adds_up_to_the_text(tokenizer, text):
    assert "".join(streamed(tokenizer, tokenizer.encode(text))) == text


def test_a_stream_never_splits_a_character(tokenizer):
    pieces = streamed(tokenizer, tokenizer.encode("é😀"))
    assert [piece for piece in pieces if piece] == ["é", "😀"]


def test_a_stream_leaves_out_special_tokens_when_asked(tokenizer):
    tokens = tokenizer.encode(f"a{END_OF_DOCUMENT}b{END_OF_DOCUMENT}")
    assert "".join(streamed(tokenizer, tokens, skip_special=True)) == "ab"


def test_a_stream_of_any_tokens_is_their_text(tokenizer):
    rng = random.Random(0)
    for _ in range(100):
        tokens = [rng.randrange(tokenizer.vocab_size) for _ in range(60)]
        assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)
