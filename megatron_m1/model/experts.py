"""The experts of one rank without Transformer Engine: one autograd function around them all.

Megatron's own loop builds a graph of a dozen nodes for each expert and keeps what each of them
saves. Here the backward is written out, and besides the inputs only the first product is kept:

    h = x W1^T = (gate | up);  m = silu(gate) * up;  y = (p m) W2^T

Shapes: N tokens sent to this rank in the order of its experts, C width of the model, F FFN width;
n tokens of one expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable


class Experts(SequentialMLP):
    """Megatron's sequential experts: the same parameters and checkpoints, another forward."""

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """[N, C], [experts], [N] -> ([N, C], no bias)."""
        linear = self.local_experts[0].linear_fc1
        if self.tp_group.size() > 1 or linear._forward_pre_hooks:
            # Only Megatron's linear layers know the columns of other ranks, and only calling them
            # runs the hooks by which overlapped parameters arrive.
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        weights = [
            linear.weight
            for expert in self.local_experts
            for linear in (expert.linear_fc1, expert.linear_fc2)
        ]
        counts = tokens_per_expert.tolist()
        output = _Experts.apply(permuted_local_hidden_states, permuted_probs, counts, *weights)
        return output, None


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
