"""The choice of a token, and texts that grow by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_m1.data.tokenizer import END_OF_DOCUMENT, train_bpe
from megatron_m1.errors import InputError
from megatron_m1.inference.load import Loaded, load_tokenizer
from megatron_m1.inference.sampling import Sampling, choose, continue_text, continue_tokens
from megatron_m1.model.build import build_chunks, forward_row
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout
from parallel.packing import PackedRow
from tests.distributed import Pool
from tests.inference.trained import LAYOUTS, load_into
from tests.training import small_run

MODEL = replace(small_run.MODEL, num_layers=2, layer_pattern="LS", vocab_size=300)
PROMPT = [5, 6, 7, 12, 13]
LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def drawn(sampling: Sampling, draws: int = 4000) -> torch.Tensor:
    """Shares of each token in many draws."""
    generator = torch.Generator().manual_seed(0)
    tokens = [choose(LOGITS, sampling, generator) for _ in range(draws)]
    return torch.bincount(torch.tensor(tokens), minlength=4) / draws


def test_temperature_zero_takes_the_most_likely() -> None:
    assert drawn(Sampling(temperature=0), draws=3).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(temperature=1), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(temperature=1, top_p=0.7), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1, top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(temperature=1, top_p=0.01), [0, 1, 0, 0]),
    ],
)
def test_shares(sampling: Sampling, shares: list[float]) -> None:
    assert drawn(sampling).tolist() == pytest.approx(shares, abs=0.03)


def continued(layout: Layout, checkpoint: Path, sampling: Sampling) -> list[int]:
    loaded = load_into(layout, checkpoint)
    return list(continue_tokens(loaded.chunks, layout, PROMPT, 6, sampling))


def greedy_by_hand(checkpoint: Path) -> list[int]:
    (chunk,) = load_into(Layout(), checkpoint).chunks
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(6):
            row = PackedRow.from_documents([torch.tensor(tokens)])
            tokens.append(int(forward_row(chunk.eval(), row, with_loss=False)[0, -1].argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_continues_alike(
    name: str, ranks: Callable[[int], Pool], checkpoint: Path
) -> None:
    size, layout = LAYOUTS[name]
    (greedy,) = ranks(1).run(greedy_by_hand, checkpoint)
    assert ranks(size).run(continued, layout, checkpoint, Sampling()) == [greedy] * size
    hot = Sampling(temperature=2.0, seed=3)
    (alone,) = ranks(1).run(continued, Layout(), checkpoint, hot)
    assert alone != greedy
    assert ranks(size).run(continued, layout, checkpoint, hot) == [alone] * size


@pytest.fixture
def untrained(single_process: Layout) -> Loaded:
    return Loaded(MODEL, build_chunks(MODEL, transformer_config(MODEL, Layout()), seed=1), Path())


def test_text_comes_in_whole_characters(untrained: Loaded) -> None:
    """An untrained model writes bytes at random, so that characters are cut and broken off."""
    tokenizer = train_bpe(["naïve"], 300)
    sampling = Sampling(temperature=1.0, seed=2)
    arguments = (untrained.chunks, Layout())
    ids = list(continue_tokens(*arguments, tokenizer.encode("ü"), 12, sampling, tokenizer.eod))
    pieces = list(continue_text(*arguments, tokenizer, "ü", 12, sampling))
    assert len(pieces) == len(ids) + 1
    assert "".join(pieces) == tokenizer.decode(ids)


def test_an_empty_prompt_starts_a_document(untrained: Loaded) -> None:
    tokenizer = train_bpe(["naïve"], 300)
    arguments = (untrained.chunks, Layout())
    ids = list(continue_tokens(*arguments, [tokenizer.eod], 5, Sampling(), tokenizer.eod))
    pieces = continue_text(*arguments, tokenizer, "", 5, Sampling())
    assert "".join(pieces) == tokenizer.decode(ids)


def test_generation_ends_at_the_end_of_the_document(untrained: Loaded) -> None:
    arguments = (untrained.chunks, Layout(), [1, 2], 10, Sampling(temperature=1.0))
    tokens = list(continue_tokens(*arguments))
    assert len(tokens) == 10
    assert list(continue_tokens(*arguments, stop=tokens[4])) == tokens[: tokens.index(tokens[4])]


def test_the_tokenizer_must_be_the_models(tmp_path: Path) -> None:
    train_bpe(["naïve"], 300).save(tmp_path)
    loaded = Loaded(MODEL, [], tmp_path)
    size = load_tokenizer(None, END_OF_DOCUMENT, loaded).vocab_size
    with pytest.raises(InputError, match=f"has {size} tokens, but the checkpoint's model knows 9"):
        load_tokenizer(None, END_OF_DOCUMENT, replace(loaded, model=replace(MODEL, vocab_size=9)))
    with pytest.raises(InputError, match="tokenizer=.*none.json does not exist"):
        load_tokenizer(str(tmp_path / "none.json"), END_OF_DOCUMENT, loaded)
    with pytest.raises(InputError, match="no token <eos> to end a document with"):
        load_tokenizer(None, "<eos>", loaded)
