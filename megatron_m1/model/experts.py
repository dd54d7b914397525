"""The experts of one rank without Transformer Engine: one autograd function around them all.

Megatron's own loop builds a graph of a dozen nodes for each expert and keeps what each of them
saves. Here the backward is written out, and besides the inputs only the first product is kept:

    h = x W1^T = (gate | up);  m = silu(gate) * up;  y = p (m W2^T)

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
        if self.tp_group.size() > 1:
            # Only Megatron's linear layers know the columns of the other ranks.
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
        for x, y, w1, w2 in zip(
            x_NC.split(counts), y_NC.split(counts), weights[0::2], weights[1::2], strict=True
        ):
            h_n2F = x @ w1.T
            gate, up = h_n2F.chunk(2, dim=-1)
            torch.mm(F.silu(gate).mul_(up), w2.T, out=y)
            products.append(h_n2F)
        ctx.save_for_backward(x_NC, probs_N, *products, *weights)
        ctx.counts = counts
        return y_NC.mul_(probs_N[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NC: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, probs_N, *rest = ctx.saved_tensors
        products, weights = rest[: len(ctx.counts)], rest[len(ctx.counts) :]
        dx_NC, p_dp_N = torch.empty_like(x_NC), torch.empty_like(probs_N)
        # From here on the gradient of m W2^T, which has p in it.
        dy_NC = (dy_NC * probs_N[:, None]).to(dy_NC.dtype)
        dweights = []
        for x, dx, dy, p_dp, h_n2F, w1, w2 in zip(
            *(tensor.split(ctx.counts) for tensor in (x_NC, dx_NC, dy_NC, p_dp_N)),
            products,
            weights[0::2],
            weights[1::2],
            strict=True,
        ):
            gate, up = h_n2F.chunk(2, dim=-1)
            silu = F.silu(gate)
            mixed = silu * up
            dmixed = dy @ w2
            torch.sum(dmixed * mixed, dim=-1, dtype=p_dp.dtype, out=p_dp)
            dh_n2F = torch.empty_like(h_n2F)
            dgate, dup = dh_n2F.chunk(2, dim=-1)
            torch.mul(dmixed, silu, out=dup)
            torch.ops.aten.silu_backward.grad_input(dmixed.mul_(up), gate, grad_input=dgate)
            torch.mm(dh_n2F, w1, out=dx)
            dweights += [dh_n2F.T @ x, dy.T @ mixed]
        # Where a probability underflowed to zero, so does what the softmax makes of its gradient.
        dprobs_N = p_dp_N / probs_N.clamp(min=torch.finfo(probs_N.dtype).tiny)
        return dx_NC, dprobs_N, None, *dweights
