"""The experts of one rank without Transformer Engine: one autograd function around them all.

Megatron's own loop builds a graph of a dozen nodes for each expert and keeps what each of them
saves. Here the backward is written out, and besides the inputs only the first product is kept:

    h = x W1^T = (gate | up);  m = silu(gate) * up;  y = (p m) W2^T

Shapes: N tokens sent to this rank in the order of its experts, C width of the model, F FFN width;
n tokens of one expert.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable

MANY = 64
"""Tokens of an expert from which on they are faster as rows."""


class Experts(SequentialMLP):
    """Megatron's sequential experts: the same parameters and checkpoints, another forward."""

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """[N, C], [experts], [N] -> ([N, C], no bias)."""
        if not self.usable_without_calls:
            # Only Megatron's linear layers know the columns of other ranks, and only calling them
            # runs the hooks by which overlapped parameters arrive.
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        counts = tokens_per_expert.tolist()
        output = _Experts.apply(
            permuted_local_hidden_states, permuted_probs, counts, *self._weights
        )
        return output, None

    @property
    def usable_without_calls(self) -> bool:
        """Whether a rank's weights alone are enough to compute with."""
        return self.tp_group.size() == 1 and not self.local_experts[0].linear_fc1._forward_pre_hooks

    @torch.no_grad()
    def answers(self, x_NC: Tensor, probs_N: Tensor, counts: list[int]) -> Tensor:
        """``forward`` with nothing kept, in an order of calls for generation."""
        w1s, w2s = self._weights[0::2], self._weights[1::2]
        if max(counts) > MANY:
            return _answers_by_rows(x_NC, probs_N[:, None], counts, w1s, w2s)
        # Tokens as columns: see kernels/few_rows.py. One call for the activations of all experts.
        h_2FN = x_NC.new_empty(w1s[0].shape[0], x_NC.shape[0])
        y_CN = x_NC.new_empty(x_NC.shape[1], x_NC.shape[0])
        for w1, x, h in zip(w1s, x_NC.T.split(counts, 1), h_2FN.split(counts, 1), strict=True):
            if h.shape[1]:
                torch.mm(w1, x, out=h)
        gate, up = h_2FN.chunk(2)
        mixed_FN = F.silu(gate).mul_(up).mul_(probs_N)
        for w2, m, y in zip(w2s, mixed_FN.split(counts, 1), y_CN.split(counts, 1), strict=True):
            if y.shape[1]:
                torch.mm(w2, m, out=y)
        return y_CN.T

    @cached_property
    def _weights(self) -> list[Tensor]:
        return [
            linear.weight
            for expert in self.local_experts
            for linear in (expert.linear_fc1, expert.linear_fc2)
        ]


def _answers_by_rows(
    x_NC: Tensor, probs_N1: Tensor, counts: list[int], w1s: list[Tensor], w2s: list[Tensor]
) -> Tensor:
    y_NC = torch.empty_like(x_NC)
    rows = (tensor.split(counts) for tensor in (x_NC, probs_N1, y_NC))
    for w1, w2, x, p, y in zip(w1s, w2s, *rows, strict=True):
        gate, up = (x @ w1.T).chunk(2, dim=-1)
        torch.mm(F.silu(gate).mul_(up).mul_(p), w2.T, out=y)
    return y_NC


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NC: Tensor, probs_N: Tensor, counts: list[int], *weights: Tensor
    ) -> Tensor:
        y_NC = torch.empty_like(x_NC)
        products = []
        for x, y, p, w1, w2 in zip(
            *(tensor.split(counts) for tensor in (x_NC, y_NC, probs_N[:, None])),
            weights[0::2],
            weights[1::2],
            strict=True,
        ):
            h_n2F = x @ w1.T
            gate, up = h_n2F.chunk(2, dim=-1)
            torch.mm(F.silu(gate).mul_(up).mul_(p), w2.T, out=y)
            products.append(h_n2F)
        ctx.save_for_backward(x_NC, probs_N, *products, *weights)
        ctx.counts = counts
        return y_NC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NC: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, probs_N, *rest = ctx.saved_tensors
        products, weights = rest[: len(ctx.counts)], rest[len(ctx.counts) :]
        dx_NC, dprobs_N = torch.empty_like(x_NC), torch.empty_like(probs_N)
        dweights = []
        for x, dx, dy, p, dp, h_n2F, w1, w2 in zip(
            *(t.split(ctx.counts) for t in (x_NC, dx_NC, dy_NC, probs_N[:, None], dprobs_N)),
            products,
            weights[0::2],
            weights[1::2],
            strict=True,
        ):
            gate, up = h_n2F.chunk(2, dim=-1)
            silu = F.silu(gate)
            mixed = silu * up
            dmixed = dy @ w2
            torch.sum(dmixed * mixed, dim=-1, dtype=dp.dtype, out=dp)
            dmixed.mul_(p)
            dh_n2F = torch.empty_like(h_n2F)
            dgate, dup = dh_n2F.chunk(2, dim=-1)
            torch.mul(dmixed, silu, out=dup)
            torch.ops.aten.silu_backward.grad_input(dmixed.mul_(up), gate, grad_input=dgate)
            torch.mm(dh_n2F, w1, out=dx)
            dweights += [dh_n2F.T @ x, dy.T @ mixed.mul_(p)]
        return dx_NC, dprobs_N, None, *dweights
