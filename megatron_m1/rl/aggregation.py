"""How the losses of tokens become one loss: a weight for each token, computed once from the lengths
of every response of the batch.

The loss of any part of the batch (a micro-batch, a rank's tokens) is then a weighted sum over its
tokens, and the parts add up to the loss of the whole, however it is cut.

P prompts with a live token, L_p live tokens of prompt p, R responses with one, L_i of response i:

    prompt_mean     1 / (P L_p)       Eq. 4 of MiniMax-M1: a mean over the tokens of each prompt
    token_mean      1 / (sum of L_p)  DAPO's: every token of the batch weighs the same
    sequence_mean   1 / (R L_i)       GRPO's: every response weighs the same

The weights add up to 1 over all live tokens. Shapes: R responses, T places of the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor

AGGREGATIONS = ("prompt_mean", "token_mean", "sequence_mean")


def response_weights(
    lengths: Tensor,
    prompt_index: Tensor | None = None,
    aggregation: str = "prompt_mean",
    sequence_share: float = 0.0,
) -> Tensor:
    """The weight of each token of a response, `[R]` float64.

    Args:
        lengths: `[R]` live tokens of every response of the batch; 0 is a response left out.
        prompt_index: `[R]` the prompt of each response, any integers; None is one prompt for all.
        aggregation: one of ``AGGREGATIONS``.
        sequence_share: MiniMax-M1's loss of samples and tokens combined, for late in training: this
            share of each weight is sequence_mean's and the rest ``aggregation``'s. The report
            names the combination and not its mix.

    Raises:
        ValueError: an aggregation that there is not, a share out of [0, 1], shapes that differ.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}; give {', '.join(AGGREGATIONS)}")
    if not 0 <= sequence_share <= 1:
        raise ValueError(f"sequence_share is {sequence_share}; give a share in [0, 1]")
    if prompt_index is not None and prompt_index.shape != lengths.shape:
        raise ValueError(
            f"prompt_index must be {list(lengths.shape)} like the responses, got "
            f"{list(prompt_index.shape)}"
        )
    lengths = lengths.double()
    weights = _weights(lengths, prompt_index, aggregation)
    return weights + sequence_share * (_weights(lengths, None, "sequence_mean") - weights)


def token_weights(
    mask: Tensor,
    prompt_index: Tensor | None = None,
    aggregation: str = "prompt_mean",
    sequence_share: float = 0.0,
) -> Tensor:
    """`[R, T]` float64 weights of a batch whose live tokens are the non-zero ones of a `[R, T]`
    mask; 0 elsewhere. The other arguments and errors are those of `response_weights`."""
    live = mask != 0
    weights = response_weights(live.sum(1), prompt_index, aggregation, sequence_share)
    return live * weights[:, None]


def _weights(lengths: Tensor, prompt_index: Tensor | None, aggregation: str) -> Tensor:
    live = lengths > 0
    if aggregation == "sequence_mean":
        divisors = live.sum() * lengths
    elif aggregation == "token_mean" or prompt_index is None:
        divisors = lengths.sum().expand_as(lengths)
    else:
        prompts, of_response = prompt_index.unique(return_inverse=True)
        tokens = lengths.new_zeros(len(prompts)).index_add_(0, of_response, lengths)
        divisors = (tokens > 0).sum() * tokens[of_response]
    # A response left out may belong to a prompt, or a batch, that is left out too: no 1 / 0.
    return torch.where(live, 1 / divisors.clamp(min=1), 0.0)
