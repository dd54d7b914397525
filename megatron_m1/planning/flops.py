"""Floating-point operations of training, prefill, decoding and generation.

All follow from what one token costs going forward when it sees a number of keys
(``ModelConfig.forward_flops``, which holds the formulas): training sees half a document on average,
prefill half the prompt, decoding the whole context. Only matrix products are counted, and of them
what the model asks for; ``blocked_lightning`` is what the chunked kernels execute beyond that.
"""

from __future__ import annotations

from typing import Protocol

from megatron_m1.model.config import LIGHTNING, ModelConfig


class Countable(Protocol):
    """A model that knows what a token costs, as an affine function of the keys that it sees."""

    def forward_flops(self, keys: float) -> dict[str, float]:
        """Operations of one token, by piece; the LM head is the piece "head"."""
        ...


def training(model: Countable, document_length: float) -> dict[str, float]:
    """Of one token, forward and backward, without recomputation: three times the forward pass.

    Args:
        document_length: mean length of the document that a token is in.
    """
    found = model.forward_flops(document_length / 2)
    return {piece: 3.0 * flops for piece, flops in found.items()}


def prefill(model: Countable, tokens: int) -> dict[str, float]:
    """Of a whole prompt. The t-th token sees t keys; only the last one meets the head."""
    found = model.forward_flops((tokens + 1) / 2)
    return {piece: flops * (1 if piece == "head" else tokens) for piece, flops in found.items()}


def decode(model: Countable, context: int) -> dict[str, float]:
    """Of one more token, with which the context has ``context`` tokens."""
    return model.forward_flops(context)


def generation(model: Countable, tokens: int, prompt: int = 0) -> float:
    """Of ``tokens`` tokens one after the other behind a prompt that is already there."""
    return tokens * sum(model.forward_flops(prompt + (tokens + 1) / 2).values())


def blocked_lightning(model: ModelConfig, chunk: int) -> float:
    """What one lightning layer executes for one token going forward when computed in chunks of C.

    Per head and token 4 D (C + D): scores and their values over whole tiles of C x C, reading and
    updating the state once a chunk (MiniMax-01, arXiv 2501.08313, section 2.2: O(n d^2 + n C d)).
    """
    inner = model.num_attention_heads * model.head_dim
    return model.layer_flops(LIGHTNING, 0)["attention"] + 4.0 * inner * chunk
