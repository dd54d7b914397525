"""The work of all ranks of a cut row by one process, on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.attention import varlen_attention
from kernels.lightning import lightning_attention_qkv
from parallel import host
from parallel.cut import Cut
from parallel.gathered_attention import earlier_keys
from parallel.lasp import Entering, Lasp, prefix_sums
from parallel.layout import CUTS
from parallel.partial_attention import (
    Options,
    PartialGradients,
    attend_rectangles,
    attend_segments,
)
from parallel.state_plan import PrefixSums, StatePlan

RANKS = range(4)
BOUNDS = [0, 5, 305, 306, 396, 512]
DTYPES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_cut = pytest.mark.parametrize("kind", CUTS)


def random_row(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(host.device(), dtype).requires_grad_()


def assert_close(found: Tensor, expected: Tensor) -> None:
    atol = DTYPES[expected.dtype] * float(expected.detach().abs().max())
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=0, atol=atol)


@each_dtype
@each_cut
def test_parts_of_an_attention_make_the_whole(kind: str, dtype: torch.dtype) -> None:
    cut, options = Cut.of(BOUNDS, len(RANKS), kind), Options(scale=0.125, backend="auto")
    q, k, v, d_out = (random_row(512, heads, 64, dtype=dtype) for heads in (4, 2, 2, 4))
    expected, _ = varlen_attention(q, k, v, torch.tensor(BOUNDS, dtype=torch.int32), scale=0.125)
    expected.backward(d_out)

    outs, dqs, dks, dvs = [], [], [], []
    dk_row, dv_row = (
        torch.zeros_like(k, dtype=torch.float32),
        torch.zeros_like(v, dtype=torch.float32),
    )
    for rank in RANKS:
        local = [cut.take(x.detach(), rank) for x in (q, k, v)]
        rectangles, bounds = earlier_keys(cut, rank), cut.local_bounds(rank)
        out, lse = attend_segments(*local, bounds, options)
        attend_rectangles(out, lse, local[0], k.detach(), v.detach(), rectangles, options)
        outs.append(out.to(dtype))
        gradients = PartialGradients(cut.take(d_out, rank), local[0], outs[-1], lse, options)
        dk, dv = gradients.of_segments(*local[1:], bounds)
        gradients.add_rectangles(k.detach(), v.detach(), rectangles, dk_row, dv_row)
        for parts, part in zip((dqs, dks, dvs), (gradients.dq_THD, dk, dv), strict=True):
            parts.append(part)
    assert_close(cut.join(outs), expected)
    assert_close(cut.join(dqs), q.grad)
    assert_close(cut.join(dks) + dk_row, k.grad)
    assert_close(cut.join(dvs) + dv_row, v.grad)


@each_dtype
@each_cut
def test_states_of_all_ranks_make_the_whole(kind: str, dtype: torch.dtype) -> None:
    cut, decay = Cut.of(BOUNDS, len(RANKS), kind), torch.tensor([0.9, 0.01], device=host.device())
    qkv, d_o = (random_row(1, 512, 2, width, dtype=dtype) for width in (3 * 64, 64))
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    expected = lightning_attention_qkv(qkv, decay, cu_seqlens=cu_seqlens, silu=True)
    expected.backward(d_o)

    sent_by: dict[int, Tensor] = {}

    def exchange(
        sums: PrefixSums, sent: Tensor, decay: Tensor, rank: int
    ) -> Callable[[], Entering]:
        sent_by[rank] = sent
        return lambda: prefix_sums(sums, torch.stack([sent_by[r] for r in RANKS]), decay)

    rows = [cut.take(qkv.detach(), rank, dim=1).requires_grad_() for rank in RANKS]
    under_way = [
        Lasp.begin(
            rows[rank],
            decay=decay,
            plan=StatePlan.of(cut, rank),
            group=rank,
            silu=True,
            exchange=exchange,
        )
        for rank in RANKS
    ]
    outs = [lasp.finish() for lasp in under_way]
    torch.autograd.backward(outs, [cut.take(d_o, rank, dim=1) for rank in RANKS])
    assert_close(cut.join(outs, dim=1), expected)
    assert_close(cut.join([row.grad for row in rows], dim=1), qkv.grad)
