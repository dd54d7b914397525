"""The norm over all heads when tensor parallelism leaves each rank some of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.distributed as dist

from tests.distributed import Pool

WIDTH, TOKENS = 48, 5


def gradients(parts: int) -> dict[str, torch.Tensor]:
    """Output and gradients of this rank's channels, from the same whole tensors everywhere."""
    from megatron_m1.model.lightning_attention import AllHeadsNorm

    torch.manual_seed(0)
    whole = [torch.randn(TOKENS, 1, WIDTH, dtype=torch.float64) for _ in range(3)]
    rank = dist.get_rank()
    hidden, gate, upstream = (tensor.chunk(parts, dim=-1)[rank].clone() for tensor in whole)
    norm = AllHeadsNorm(SimpleNamespace(params_dtype=torch.float64), WIDTH, 1e-6, dist.group.WORLD)
    hidden.requires_grad_()
    gate.requires_grad_()
    output = norm(hidden, gate)
    output.backward(upstream)
    return {
        "output": output.detach(),
        "hidden": hidden.grad,
        "gate": gate.grad,
        "weight": norm.weight.grad[None, None],
    }


def test_two_ranks_equal_one(ranks: Callable[[int], Pool]) -> None:
    (whole,) = ranks(1).run(gradients, 1)
    parts = ranks(2).run(gradients, 2)
    for name, expected in whole.items():
        joined = torch.cat([part[name] for part in parts], dim=-1)
        torch.testing.assert_close(joined, expected, rtol=1e-6, atol=1e-7, msg=name)
