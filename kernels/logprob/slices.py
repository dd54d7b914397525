"""The softmax of a slice of the vocabulary, in chunks of tokens: no gradients but those given here.

One chunk's logits exist at a time. With p the softmax over the whole vocabulary, H its entropy and
g, h the gradients of a token's log-probability and entropy,

    d_logits = g (onehot(target) - p) - h p (log p + H).

Shapes: T tokens, C width, V entries of the vocabulary in the slice, R sums of a `Partial`; N tokens
of a chunk.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.logprob.merging import Partial, Totals, totals

# Measured on a CPU: products with fewer rows spend their time on reading the weights, and more
# bytes than a cache holds gain nothing.
CHUNK_BYTES = 1 << 25
LEAST_ROWS = 512


class VocabSlice(NamedTuple):
    """Which part of the vocabulary the weight is, and who knows the others.

    `combine` turns what this slice knows of some tokens into what all slices know of them. It is
    called with the same tokens in the same order wherever a slice is. By default the slice is all.
    """

    first_token: int = 0
    combine: Callable[[Partial], Totals] = lambda partial: totals(*partial)


class Target(NamedTuple):
    """Where the targets of a chunk lie in its logits, all `[N]`: a row each, a column, and whether
    the target is in the slice at all (any column where it is not)."""

    rows_N: Tensor
    columns_N: Tensor
    held_N: Tensor


class Chunk(NamedTuple):
    """Some tokens: where they lie in the row, their logits, and where asked for another buffer of
    that shape. The next chunk overwrites both."""

    span: slice
    hidden_NC: Tensor
    target: Target
    logits_NV: Tensor
    spare_NV: Tensor | None


def slice_forward(
    hidden_TC: Tensor,
    weight_VC: Tensor,
    targets_T: Tensor,
    *,
    first_token: int = 0,
    with_entropy: bool,
    product_dtype: torch.dtype,
) -> Partial:
    """What a slice of the vocabulary knows of each token."""
    T = hidden_TC.shape[0]
    dtype = softmax_dtype(product_dtype)
    max_T = hidden_TC.new_empty(T, dtype=dtype)
    sums_RT = hidden_TC.new_empty(3 if with_entropy else 2, T, dtype=dtype)
    head_VC = weight_VC.to(product_dtype)
    for chunk in chunks(hidden_TC, head_VC, targets_T, first_token, spare=with_entropy):
        max_T[chunk.span], sums_RT[:, chunk.span] = chunk_partial(chunk)
    return Partial(max_T, sums_RT)


def slice_backward(
    d_logprobs_T: Tensor | None,
    d_entropy_T: Tensor | None,
    hidden_TC: Tensor,
    weight_VC: Tensor,
    targets_T: Tensor,
    whole: Totals,
    *,
    first_token: int = 0,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden, to be summed over the slices, and of this slice's weight, as
    `Gradients` keeps them. `whole` is of the whole vocabulary; None is a gradient of zero."""
    if d_logprobs_T is None:
        d_logprobs_T = torch.zeros_like(whole.logprobs_T)
    gradients = Gradients(hidden_TC, weight_VC.to(product_dtype))
    scale_T, slope_T = _coefficients(d_logprobs_T, d_entropy_T, whole)
    wants_spare = slope_T is not None
    for chunk in chunks(hidden_TC, gradients.head_VC, targets_T, first_token, spare=wants_spare):
        span = chunk.span
        below_NV = chunk.logits_NV.sub_(whole.max_T[span, None])
        if slope_T is None:
            d_logits_NV = below_NV.exp_().mul_(scale_T[span, None])
        else:
            exp_NV = torch.exp(below_NV, out=chunk.spare_NV)
            d_logits_NV = below_NV.mul_(slope_T[span, None]).add_(scale_T[span, None]).mul_(exp_NV)
        gradients.add(chunk, d_logits_NV, d_logprobs_T[span])
    return gradients.d_hidden_TC, gradients.d_weight_VC


def _coefficients(
    d_logprobs_T: Tensor, d_entropy_T: Tensor | None, whole: Totals
) -> tuple[Tensor, Tensor | None]:
    """a and b of d_logits = exp(l - m) (a + b (l - m)) + g onehot(target); no b where h is zero."""
    if d_entropy_T is None or whole.entropy_T is None:
        return -d_logprobs_T / whole.sum_T, None
    at_max_T = whole.entropy_T - whole.sum_T.log()
    return -(d_logprobs_T + d_entropy_T * at_max_T) / whole.sum_T, -d_entropy_T / whole.sum_T


class Gradients:
    """The gradients of hidden `[T, C]` in the products' dtype and of the weight `[V, C]` in the
    softmax's, filled chunk by chunk."""

    def __init__(self, hidden_TC: Tensor, head_VC: Tensor) -> None:
        self.head_VC = head_VC
        self.d_hidden_TC = hidden_TC.new_empty(hidden_TC.shape, dtype=head_VC.dtype)
        dtype = softmax_dtype(head_VC.dtype)
        self.d_weight_VC = head_VC.new_zeros(head_VC.shape, dtype=dtype)

    def add(self, chunk: Chunk, d_logits_NV: Tensor, d_target_N: Tensor) -> None:
        """Take a chunk's `d_logits_NV`, still without `d_target_N` at the targets."""
        rows_N, columns_N, held_N = chunk.target
        d_logits_NV[rows_N, columns_N] += d_target_N * held_N
        d_logits_NV = d_logits_NV.to(self.head_VC.dtype)
        torch.mm(d_logits_NV, self.head_VC, out=self.d_hidden_TC[chunk.span])
        if self.d_weight_VC.dtype == d_logits_NV.dtype:
            self.d_weight_VC.addmm_(d_logits_NV.mT, chunk.hidden_NC)
        else:
            self.d_weight_VC.add_(d_logits_NV.mT @ chunk.hidden_NC)


def softmax_dtype(product_dtype: torch.dtype) -> torch.dtype:
    """float32 at least."""
    return torch.promote_types(product_dtype, torch.float32)


def chunk_partial(chunk: Chunk) -> Partial:
    """What the slice knows of a chunk's tokens, with the entropy's sum if the chunk has the buffer
    for it. Leaves exp(l - m) in the chunk's logits, or in that buffer."""
    logits_NV = chunk.logits_NV
    rows_N, columns_N, held_N = chunk.target
    target_N = logits_NV[rows_N, columns_N] * held_N
    max_N1 = logits_NV.amax(-1, keepdim=True)
    below_NV = logits_NV.sub_(max_N1)
    if chunk.spare_NV is None:
        sums = [below_NV.exp_().sum(-1)]
    else:
        exp_NV = torch.exp(below_NV, out=chunk.spare_NV)
        sums = [exp_NV.sum(-1), below_NV.mul_(exp_NV).sum(-1)]
    return Partial(max_N1[:, 0], torch.stack([target_N, *sums]))


def chunks(
    hidden_TC: Tensor, head_VC: Tensor, targets_T: Tensor, first_token: int, *, spare: bool = False
) -> Iterator[Chunk]:
    """The tokens, some at a time, with their logits in the softmax's dtype."""
    T, V = hidden_TC.shape[0], head_VC.shape[0]
    dtype = softmax_dtype(head_VC.dtype)
    rows = min(max(LEAST_ROWS, CHUNK_BYTES // (V * dtype.itemsize)), T)
    buffer_NV = head_VC.new_empty(rows, V, dtype=dtype)
    spare_NV = torch.empty_like(buffer_NV) if spare else None
    for begin in range(0, T, max(rows, 1)):
        span = slice(begin, min(begin + rows, T))
        N = span.stop - begin
        hidden_NC, logits_NV = hidden_TC[span].to(head_VC.dtype), buffer_NV[:N]
        if head_VC.dtype == dtype:
            torch.mm(hidden_NC, head_VC.mT, out=logits_NV)
        else:
            logits_NV.copy_(hidden_NC @ head_VC.mT)
        target = _target(targets_T[span], first_token, V)
        yield Chunk(span, hidden_NC, target, logits_NV, None if spare_NV is None else spare_NV[:N])


def _target(targets_N: Tensor, first_token: int, V: int) -> Target:
    columns_N = targets_N - first_token
    held_N = (columns_N >= 0) & (columns_N < V)
    rows_N = torch.arange(len(targets_N), device=targets_N.device)
    return Target(rows_N, columns_N.clamp(0, V - 1), held_N)
