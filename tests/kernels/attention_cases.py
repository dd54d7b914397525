"""Rows, their documents and parts, and what tests of packed attention compare."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.attention import attention_backward, attention_forward, reference, varlen_attention
from kernels.attention.segments import Segments
from tests.kernels.compare import outputs_and_gradients, relative_error

H, D = 4, 8
BLOCK = 64
HEAD = {"out": 1, "lse": 0, "dq": 1, "dk": 1, "dv": 1}
PACKED = [
    [0, 0],
    [0, 1],
    [0, 1, 2, 3],
    [0, 0, 0, 7, 14, 21, 21],
    [0, 50, 50, 51, 200],
    [0, BLOCK, 2 * BLOCK, 4 * BLOCK + 1],
]
PARTS = [
    ([0, 0], [0, 0]),
    ([0, 4, 4], [0, 0, 0]),
    ([0, 5], [0, 9]),
    ([0, 9], [0, 5]),
    ([0, 2, 4, 6], [0, 3, 6, 9]),
    ([0, 0, 3, 6, 100], [0, 4, 7, 10, 10]),
    ([0, 70, 140, 141, 150], [0, 1, 2, 200, 2 * BLOCK + 210]),
]
"""Borders of queries and of keys, which see all of each other."""


def make_inputs(
    T: int,
    K: int = 2,
    dtype: torch.dtype = torch.float64,
    keys: int | None = None,
    width: int = D,
) -> list[Tensor]:
    """q, k and v, with T keys where no other number is given."""
    S = T if keys is None else keys
    shapes = [(T, H, width), (S, K, width), (S, K, width)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run(
    inputs: list[Tensor],
    bounds: list[int],
    backend: str,
    scale: float | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Outputs and gradients, computed on `device`, on the CPU."""

    def there_and_back(*inputs: Tensor) -> list[Tensor]:
        q, k, v = (x.to(device) for x in inputs)
        outputs = varlen_attention(q, k, v, int32(*bounds), scale=scale, backend=backend)
        return [x.cpu() for x in outputs]

    outputs, gradients = outputs_and_gradients(there_and_back, inputs)
    return dict(zip(HEAD, outputs + gradients, strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    for name, tensor in actual.items():
        error = relative_error(tensor, expected[name], HEAD[name])
        assert error <= bound, f"{name}: {error:.1e} > {bound:.0e}"


def strided(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same values, no tensor dense: a slice, heads before tokens, channels first."""
    q, k, v = inputs
    return [
        torch.cat((q, q), dim=-1)[..., : q.shape[-1]],
        k.transpose(0, 1).contiguous().transpose(0, 1),
        v.mT.contiguous().mT,
    ]


def run_part(
    inputs: Sequence[Tensor],
    bounds: tuple[list[int], list[int]],
    backend: str,
    d_out: Tensor,
    d_lse: Tensor,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Outputs and gradients of one part, as if it were the whole attention."""
    d_out, d_lse, *inputs = (x.to(device) for x in (d_out, d_lse, *inputs))
    segments: dict[str, Any] = {"bounds_q": bounds[0], "bounds_k": bounds[1], "causal": False}
    out, lse = attention_forward(*inputs, **segments, scale=0.7, backend=backend)
    grads = attention_backward(
        d_out, *inputs, out, lse, **segments, scale=0.7, d_lse=d_lse, backend=backend
    )
    return dict(zip(HEAD, (x.cpu() for x in (out, lse, *grads)), strict=True))


def formula_of_part(
    inputs: Sequence[Tensor], bounds: tuple[list[int], list[int]], d_out: Tensor, d_lse: Tensor
) -> dict[str, Tensor]:
    """The same by autograd, in float64; d_lse counts where a query has keys."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    out, lse = reference.forward(*leaves, Segments(*bounds, causal=False), 0.7, torch.float64)
    seen = lse.isfinite()
    total = (out * d_out).sum() + (lse[seen] * d_lse[seen]).sum()
    grads = torch.autograd.grad(total, leaves)
    return dict(zip(HEAD, (out, lse, *grads), strict=True))


def assert_part_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """A query without keys has the output 0 and the lse -inf, exactly."""
    blind = expected["lse"].isinf()
    assert torch.equal(actual["lse"] == -torch.inf, blind)
    assert not actual["out"][blind.mT].any() and not actual["dq"][blind.mT].any()
    finite = ({**x, "lse": x["lse"].masked_fill(blind, 0)} for x in (actual, expected))
    assert_close(*finite, bound)
