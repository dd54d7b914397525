"""Log-probabilities of tokens, their entropy and cross-entropy, from hidden states and the LM head.

No table of `[T, V]` logits exists at any time. Products and softmax are FP32 whatever the inputs
are (TF32 is for PyTorch's own switch to allow): the head's precision is where MiniMax-M1 (arXiv
2506.13585, section 3.2) found training and sampling to disagree. So Liger's fused head is no
backend: on Hopper it takes BF16 operands alone, and elsewhere it is chunks of PyTorch too, slower
than these. Tests compare with it, and with PyTorch's `linear_cross_entropy`.

Shapes: T tokens, C width, V entries of the vocabulary in the weight.
"""

import torch
from torch import Tensor

from kernels.logprob.merging import Partial, Totals, merge, rescale, totals
from kernels.logprob.portable import summed_cross_entropy_portable, token_logprobs_portable
from kernels.logprob.reference import summed_cross_entropy_reference, token_logprobs_reference
from kernels.logprob.slices import VocabSlice, slice_backward, slice_forward

__all__ = [
    "Partial",
    "Totals",
    "VocabSlice",
    "merge",
    "rescale",
    "slice_backward",
    "slice_forward",
    "summed_cross_entropy",
    "token_logprobs",
    "totals",
]

_BACKENDS = ("portable", "reference")


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    with_entropy: bool = True,
    product_dtype: torch.dtype | None = None,
    vocab_slice: VocabSlice | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`log softmax(hidden weight^T)` at the targets, and the entropy of that softmax, in nats.

    Cross-entropy is minus the first. A weighted sum of it is cheaper by `summed_cross_entropy`,
    with three matrix products in place of four.

    Args:
        hidden: `[T, C]`, any floating dtype.
        weight: `[V, C]`, any floating dtype.
        targets: `[T]` int64 in 0..V-1, which is read on the host to be checked.
        with_entropy: whether to compute the entropy; None is returned for it otherwise.
        product_dtype: in which hidden and weight are multiplied, and the logits rounded: float32
            where not given (float64 for float64). bfloat16 is for a head of that precision.
        vocab_slice: says that the weight is only a part of the vocabulary, and how to know the
            rest. Targets are then those of the whole vocabulary, and not checked; d_hidden is this
            slice's share.
        backend: "reference" forms all logits, "portable" those of some tokens at a time, "auto" is
            the fastest that runs here.

    Returns:
        The log-probabilities `[T]` and the entropy `[T]`, float32 (float64 for float64).
        Gradients reach hidden and weight through both.

    Raises:
        ValueError: a shape, dtype, device, target or backend that does not fit.
    """
    name = _backend_name(backend, vocab_slice)
    product_dtype = _checked_dtype(hidden, weight, product_dtype)
    _check_inputs(hidden, weight, targets, vocab_slice)
    if name == "reference":
        return token_logprobs_reference(hidden, weight, targets, with_entropy, product_dtype)
    part = vocab_slice or VocabSlice()
    return token_logprobs_portable(hidden, weight, targets, with_entropy, product_dtype, part)


def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    product_dtype: torch.dtype | None = None,
    vocab_slice: VocabSlice | None = None,
    backend: str = "auto",
) -> Tensor:
    """`sum of token_weights * cross-entropy`, a scalar, float32 (float64 for float64).

    With gradients on, the gradients of hidden and weight are made in the forward pass, and
    backward may run once.

    Args:
        token_weights: `[T]` of the result's dtype, without a gradient; 0 leaves a token out.

    The other arguments and errors are those of `token_logprobs`.
    """
    name = _backend_name(backend, vocab_slice)
    product_dtype = _checked_dtype(hidden, weight, product_dtype)
    _check_inputs(hidden, weight, targets, vocab_slice)
    dtype = torch.promote_types(product_dtype, torch.float32)
    if token_weights.shape != targets.shape or token_weights.dtype != dtype:
        raise ValueError(
            f"token_weights must be {dtype} of shape {list(targets.shape)}, got "
            f"{token_weights.dtype} of shape {list(token_weights.shape)}"
        )
    if token_weights.requires_grad:
        raise ValueError("token_weights must not require a gradient, which they would not get")
    arguments = hidden, weight, targets, token_weights, product_dtype
    if name == "reference":
        return summed_cross_entropy_reference(*arguments)
    return summed_cross_entropy_portable(*arguments, vocab_slice or VocabSlice())


def _backend_name(backend: str, vocab_slice: VocabSlice | None) -> str:
    name = "portable" if backend == "auto" else backend
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(_BACKENDS)}, got {backend!r}")
    if name == "reference" and vocab_slice is not None:
        raise ValueError("backend='reference' takes the whole vocabulary, got a vocab_slice")
    return name


def _checked_dtype(
    hidden: Tensor, weight: Tensor, product_dtype: torch.dtype | None
) -> torch.dtype:
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(
            f"hidden and weight must be floating point, got {hidden.dtype} and {weight.dtype}"
        )
    if product_dtype is None:
        widest = torch.promote_types(hidden.dtype, weight.dtype)
        return torch.promote_types(widest, torch.float32)
    if not product_dtype.is_floating_point:
        raise ValueError(f"product_dtype must be floating point, got {product_dtype}")
    return product_dtype


def _check_inputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_slice: VocabSlice | None
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [T, C] and weight [V, C], got {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight must have a row for at least one token, got none")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be torch.int64 of shape {list(hidden.shape[:1])}, got {targets.dtype} "
            f"of shape {list(targets.shape)}"
        )
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden, weight and targets must be on one device, got {hidden.device}, "
            f"{weight.device} and {targets.device}"
        )
    if vocab_slice is None and len(targets):
        least, most = targets.min().item(), targets.max().item()
        if least < 0 or most >= weight.shape[0]:
            raise ValueError(f"targets must be in 0..{weight.shape[0] - 1}, got {least} to {most}")
