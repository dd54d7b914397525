"""Continue a prompt, one token at a time.

Each token runs the whole text through the model again: right in every layout, and quadratic in the
length. Incremental decoding with a state cache is not built yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.inference.forward import forward_rows, padded_length
from megatron_m1.model.build import unwrap
from parallel import host
from parallel.layout import Layout
from parallel.packing import PackedRow


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: sample from the fewest tokens whose probabilities reach this sum.
        seed: of the draws; every process draws the same.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token from logits [V]."""
    logits = logits.cpu()
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    # The first token stays whatever top_p is.
    probabilities[(before >= sampling.top_p) & (before > 0)] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def continue_tokens(
    chunks: list[nn.Module],
    layout: Layout,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: int | None = None,
) -> Iterator[int]:
    """The tokens that follow ``prompt``, up to and without ``stop``. Collective."""
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        token = _agreed(choose(_next_logits(chunks, layout, tokens), sampling, generator))
        if token == stop:
            return
        tokens.append(token)
        yield token


def continue_text(
    chunks: list[nn.Module],
    layout: Layout,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[str]:
    """The text that follows ``prompt``, in pieces of whole characters."""
    stream = tokenizer.decode_stream()
    # A model that has seen only whole documents starts an empty prompt where a document starts.
    ids = tokenizer.encode(prompt) or [tokenizer.eod]
    for token in continue_tokens(chunks, layout, ids, max_new_tokens, sampling, tokenizer.eod):
        yield stream.step(token)
    yield stream.finish()


def _agreed(token: int) -> int:
    """The first process's token on all of them: copies of the model may differ in the last bit, and
    one that stopped alone would leave the others waiting."""
    chosen = torch.tensor(token, device=host.device())
    dist.broadcast(chosen, src=0)
    return int(chosen)


def _next_logits(chunks: list[nn.Module], layout: Layout, tokens: list[int]) -> Tensor:
    """[V], what the model makes of the place after ``tokens``."""
    length = padded_length(len(tokens), layout)
    row = PackedRow.from_documents([torch.tensor(tokens)], pad_to=length)

    def last_position(logits: Tensor, row: PackedRow) -> Tensor:
        return gather_from_tensor_model_parallel_region(logits[:, len(tokens) - 1])[0]

    vocabulary = unwrap(chunks[0]).vocab_size
    return forward_rows(chunks, [row], last_position, vocabulary, with_loss=False)[0]
