"""Token log-probabilities and summed cross-entropy in chunks of tokens, on any device.

Log-probabilities multiply hidden and weight a second time in the backward, since only it knows the
gradient of each token. The sum knows it beforehand up to one factor, so its forward makes the
gradients with the logits that it has, and its backward only scales them.

Shapes: T tokens, C width, V entries of the vocabulary held here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.logprob.merging import Totals
from kernels.logprob.slices import (
    Gradients,
    VocabSlice,
    chunk_partial,
    chunks,
    slice_backward,
    slice_forward,
    softmax_dtype,
)


def token_logprobs_portable(
    hidden_TC: Tensor,
    weight_VC: Tensor,
    targets_T: Tensor,
    with_entropy: bool,
    product_dtype: torch.dtype,
    part: VocabSlice,
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs`, keeping its arguments and numbers of each token for the backward.

    Arguments are checked by the caller.
    """
    return _TokenLogprobs.apply(hidden_TC, weight_VC, targets_T, with_entropy, product_dtype, part)


def summed_cross_entropy_portable(
    hidden_TC: Tensor,
    weight_VC: Tensor,
    targets_T: Tensor,
    token_weights_T: Tensor,
    product_dtype: torch.dtype,
    part: VocabSlice,
) -> Tensor:
    """`summed_cross_entropy`, keeping only gradients. Arguments are checked by the caller."""
    return _SummedCrossEntropy.apply(
        hidden_TC,
        weight_VC,
        targets_T,
        token_weights_T,
        product_dtype,
        part,
        # Inside of a Function, gradients are always off.
        torch.is_grad_enabled() and (hidden_TC.requires_grad or weight_VC.requires_grad),
    )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TC: Tensor,
        weight_VC: Tensor,
        targets_T: Tensor,
        with_entropy: bool,
        product_dtype: torch.dtype,
        part: VocabSlice,
    ) -> tuple[Tensor, Tensor | None]:
        partial = slice_forward(
            hidden_TC,
            weight_VC,
            targets_T,
            first_token=part.first_token,
            with_entropy=with_entropy,
            product_dtype=product_dtype,
        )
        whole = part.combine(partial)
        ctx.save_for_backward(hidden_TC, weight_VC, targets_T, *whole)
        ctx.product_dtype, ctx.first_token = product_dtype, part.first_token
        ctx.set_materialize_grads(False)
        return whole.logprobs_T, whole.entropy_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_logprobs_T: Tensor | None, d_entropy_T: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_TC, weight_VC, targets_T, *whole = ctx.saved_tensors
        d_hidden_TC, d_weight_VC = slice_backward(
            d_logprobs_T,
            d_entropy_T,
            hidden_TC,
            weight_VC,
            targets_T,
            Totals(*whole),
            first_token=ctx.first_token,
            product_dtype=ctx.product_dtype,
        )
        gradients = d_hidden_TC.to(hidden_TC.dtype), d_weight_VC.to(weight_VC.dtype)
        return *gradients, None, None, None, None


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TC: Tensor,
        weight_VC: Tensor,
        targets_T: Tensor,
        token_weights_T: Tensor,
        product_dtype: torch.dtype,
        part: VocabSlice,
        with_gradients: bool,
    ) -> Tensor:
        head_VC = weight_VC.to(product_dtype)
        gradients = Gradients(hidden_TC, head_VC) if with_gradients else None
        losses_T = torch.empty_like(token_weights_T, dtype=softmax_dtype(product_dtype))
        for chunk in chunks(hidden_TC, head_VC, targets_T, part.first_token):
            partial = chunk_partial(chunk)
            whole = part.combine(partial)
            losses_T[chunk.span] = -whole.logprobs_T
            if gradients is not None:
                weights_N = token_weights_T[chunk.span]
                scale_N = weights_N * (partial.max_T - whole.max_T).exp() / whole.sum_T
                # The chunk's logits are exp(l - m) by now, m being the slice's maximum.
                d_logits_NV = chunk.logits_NV.mul_(scale_N[:, None])
                gradients.add(chunk, d_logits_NV, -weights_N)
        if gradients is not None:
            ctx.gradients = (
                gradients.d_hidden_TC.to(hidden_TC.dtype),
                gradients.d_weight_VC.to(weight_VC.dtype),
            )
        return losses_T.mul_(token_weights_T).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "summed_cross_entropy has handed out its gradients: call backward() once, or "
                "use token_logprobs"
            )
        (d_hidden_TC, d_weight_VC), ctx.gradients = ctx.gradients, None
        return d_hidden_TC.mul_(d_sum), d_weight_VC.mul_(d_sum), *[None] * 5
