"""Token log-probabilities from the whole table of logits, differentiable by autograd itself."""

import torch
from torch import Tensor

from kernels.autocast import without_autocast


@without_autocast
def token_logprobs_reference(
    hidden_TC: Tensor,
    weight_VC: Tensor,
    targets_T: Tensor,
    with_entropy: bool,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs`. Arguments are checked by the caller."""
    logits_TV = hidden_TC.to(product_dtype) @ weight_VC.to(product_dtype).mT
    logits_TV = logits_TV.to(torch.promote_types(product_dtype, torch.float32))
    log_p_TV = logits_TV.log_softmax(-1)
    logprobs_T = log_p_TV.gather(1, targets_T[:, None])[:, 0]
    entropy_T = -(log_p_TV.exp() * log_p_TV).sum(-1) if with_entropy else None
    return logprobs_T, entropy_T


def summed_cross_entropy_reference(
    hidden_TC: Tensor,
    weight_VC: Tensor,
    targets_T: Tensor,
    token_weights_T: Tensor,
    product_dtype: torch.dtype,
) -> Tensor:
    """`summed_cross_entropy`. Arguments are checked by the caller."""
    logprobs_T, _ = token_logprobs_reference(hidden_TC, weight_VC, targets_T, False, product_dtype)
    return -(logprobs_T * token_weights_T).sum()
