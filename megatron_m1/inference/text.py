"""The text that follows a prompt, as it is generated."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.inference.generation import Generator
from megatron_m1.inference.requests import SamplingParams, Sequence


def continue_text(
    chunks: list[nn.Module],
    tokenizer: Tokenizer,
    prompt: str,
    sampling: SamplingParams,
    seed: int = 0,
) -> Iterator[str]:
    """The text that follows ``prompt``, without the end of the document, in pieces of whole
    characters. Collective."""
    generator = Generator(chunks, slots=1, stop_token=tokenizer.eod, tokenizer=tokenizer)
    stream = tokenizer.decode_stream()
    # A model that has seen only whole documents starts an empty prompt where a document starts.
    ids = tuple(tokenizer.encode(prompt)) or (tokenizer.eod,)
    for token in generator.tokens(Sequence(ids, sampling, seed)):
        if token != tokenizer.eod:
            yield stream.step(token)
    yield stream.finish()
