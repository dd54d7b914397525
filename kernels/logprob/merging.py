"""What one slice of the vocabulary knows of each token, and how slices become the whole softmax.

With m the largest logit of a token, over a slice or over the whole vocabulary:

    s = sum exp(l - m),  w = sum exp(l - m) (l - m),
    log p(target) = (l_target - m) - log s,  entropy = log s - w / s.

Differences to m keep their precision where the logits are large, so m and s are never joined into
one log-sum-exp. Shapes: T tokens, R = 2 sums, or 3 with the entropy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """A slice of the vocabulary: m `[T]`, and `[R, T]` with rows l_target (0 where another slice
    holds the target), s and, for the entropy, w. All float32, or float64."""

    max_T: Tensor
    sums_RT: Tensor


class Totals(NamedTuple):
    """The whole vocabulary: m, s, the target's log-probability and the entropy in nats, all `[T]`;
    no entropy where the partials have no w."""

    max_T: Tensor
    sum_T: Tensor
    logprobs_T: Tensor
    entropy_T: Tensor | None


def rescale(partial: Partial, max_T: Tensor) -> Tensor:
    """The `[R, T]` sums of a slice relative to the maximum of all slices: these add up."""
    target_T, sum_T, *weighted_T = partial.sums_RT
    below_T = partial.max_T - max_T
    weighted_T = [(w_T + below_T * sum_T) * below_T.exp() for w_T in weighted_T]
    return torch.stack([target_T, sum_T * below_T.exp(), *weighted_T])


def totals(max_T: Tensor, sums_RT: Tensor) -> Totals:
    """From the maximum of all slices and the sum of what `rescale` makes of each."""
    target_T, sum_T, *weighted_T = sums_RT
    log_sum_T = sum_T.log()
    entropy_T = log_sum_T - weighted_T[0] / sum_T if weighted_T else None
    return Totals(max_T, sum_T, (target_T - max_T) - log_sum_T, entropy_T)


def merge(partials: Sequence[Partial]) -> Totals:
    """The whole vocabulary from all its slices."""
    max_T = torch.stack([partial.max_T for partial in partials]).amax(0)
    return totals(max_T, torch.stack([rescale(partial, max_T) for partial in partials]).sum(0))
