"""Kernels choose the dtype of their products themselves, whatever autocast a caller is in."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.attention import blockwise, varlen_attention
from kernels.gated_norm import gated_rms_norm
from kernels.lightning import lightning_attention, lightning_state_gradient
from kernels.logprob import token_logprobs

DECAY = torch.tensor([0.0, 0.5])
BORDERS = torch.tensor([0, 20, 40], dtype=torch.int32)
TARGETS = torch.arange(40)


def lightning(backend: str, x: Tensor) -> Tensor:
    q, k, v = x.view(1, 40, 2, -1).chunk(3, dim=-1)
    o = lightning_attention(q, k, v, DECAY, backend=backend)
    return o + lightning_state_gradient(q, v, DECAY, backend=backend).sum()


def attention(backend: str, x: Tensor) -> Tensor:
    return varlen_attention(*x.view(40, 2, -1).chunk(3, dim=-1), BORDERS, backend=backend)[0]


def logprobs(backend: str, x: Tensor) -> Tensor:
    return token_logprobs(x, x, TARGETS, backend=backend)[0]


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("kernel", [lightning, attention, logprobs])
def test_forward_is_the_same(kernel: Callable[..., Tensor], backend: str) -> None:
    x = torch.randn(40, 48)
    expected = kernel(backend, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernel(backend, x), expected)


def test_blocks_are_the_same() -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 8)

    def both() -> list[Tensor]:
        out, lse = blockwise.forward(q, k, v, 1.0, True, torch.float32)
        gradients = blockwise.backward(v, q, k, v, out, lse, None, 1.0, True, torch.float32)
        return [out, lse, *gradients]

    expected = both()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, both(), expected))


def test_backward_of_the_norm_is_the_same() -> None:
    x, gate = torch.randn(2, 40, 48)
    weight = torch.ones(48, requires_grad=True)
    y = gated_rms_norm(x, gate, weight, eps=1e-6)
    (expected,) = torch.autograd.grad(y, weight, x, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(y, weight, x)[0], expected)
