"""The LM head: logits, or losses and entropy of tokens without a table of logits.

With ``fp32_lm_head`` weights, product and gradient are FP32: MiniMax-M1 (arXiv 2506.13585, section
3.2) found trainer and rollout probabilities to disagree through the head's precision.

Shapes: T tokens of the row, C width, V / tp rows of the vocabulary on this rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from kernels.few_rows import few_rows_linear
from kernels.logprob import (
    Partial,
    Totals,
    VocabSlice,
    rescale,
    summed_cross_entropy,
    token_logprobs,
    totals,
)
from megatron_m1.model.float32 import KeepFloat32


class LMHead(KeepFloat32, ColumnParallelLinear):
    """A vocabulary-parallel head that multiplies in the precision of its weights.

    Everything goes through ``forward``, since Megatron waits for gathered parameters in hooks of
    the module's call.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, in_fp32: bool, **kwargs: Any
    ) -> None:
        if in_fp32:
            config = copy.copy(config)
            config.params_dtype = torch.float32
        super().__init__(input_size, output_size, config=config, **kwargs)

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        with_entropy: bool = False,
        only: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """[T, 1, C] in any precision (over tp with sequence parallelism) to one of

        - logits [T, 1, V / tp] in the weights' precision, with ``only`` [n] int64 of these tokens,
        - with ``labels`` [T], losses [1, T] float32, and with ``with_entropy`` losses and entropy
          [2, T] in nats,
        - with ``loss_mask`` [T] float32 too, the sum of losses times mask, whose gradients are
          ready with it: backward may run once.

        The None stands for Megatron's bias.
        """
        # So that what ranks add up of the gradient is in this precision too.
        hidden = input_.to(self.weight.dtype)
        if only is not None:
            chosen = self._all_tokens(hidden).index_select(0, only)
            return few_rows_linear(chosen, self.weight)[:, None], None
        if labels is None:
            return super().forward(hidden, weight, runtime_gather_output)
        arguments = self._all_tokens(hidden), self.weight, labels
        options: dict[str, Any] = {
            "product_dtype": self.weight.dtype,
            "vocab_slice": VocabSlice(
                self.tp_group.rank() * self.weight.shape[0], _over(self.tp_group)
            ),
        }
        if loss_mask is not None:
            return summed_cross_entropy(*arguments, loss_mask, **options), None
        logprobs, entropy = token_logprobs(*arguments, with_entropy=with_entropy, **options)
        return torch.stack([-logprobs] if entropy is None else [-logprobs, entropy]), None

    def _all_tokens(self, hidden: Tensor) -> Tensor:
        """[T, C] of all tokens of the row on every rank, whose gradients add up over the ranks."""
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return hidden.flatten(0, 1)


def _over(group: dist.ProcessGroup) -> Callable[[Partial], Totals]:
    """How ranks that hold a slice of the vocabulary each learn of the whole."""

    def combine(partial: Partial) -> Totals:
        if group.size() == 1:
            return totals(*partial)
        max_T = partial.max_T.clone()
        dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
        sums_RT = rescale(partial, max_T)
        dist.all_reduce(sums_RT, group=group)
        return totals(max_T, sums_RT)

    return combine
