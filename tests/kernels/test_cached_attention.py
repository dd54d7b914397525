"""Attention to keys and values in a pool, against whole rows by the definition."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.attention import varlen_attention
from kernels.attention.cached import attend_next, attend_one

P, M, H, K, D = 6, 40, 4, 2, 8


def pool(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(P, K, M, D).to(dtype) for _ in range(2)]


def last_of_whole_row(q_HD: Tensor, keys_KMD: Tensor, values_KMD: Tensor, length: int) -> Tensor:
    """The last query's row of a whole attention: [H, D]."""
    k, v = (x[:, :length].transpose(0, 1).double() for x in (keys_KMD, values_KMD))
    q = torch.zeros(length, H, D, dtype=torch.float64)
    q[-1] = q_HD
    bounds = torch.tensor([0, length], dtype=torch.int32)
    return varlen_attention(q, k, v, bounds, backend="reference")[0][-1]


@pytest.mark.parametrize("backend", ["runs", "masked", "auto"])
@pytest.mark.parametrize(
    ("slots", "lengths"),
    [
        ([0, 1, 2, 3, 4, 5], [7] * 6),
        ([0, 1, 2, 3, 4, 5], [40, 1, 1, 9, 9, 3]),
        ([1, 2, 4], [5, 5, 5]),
        ([0, 2, 4], [11, 2, 40]),
        ([5], [1]),
    ],
)
def test_one_query_of_each_sequence(slots: list[int], lengths: list[int], backend: str) -> None:
    keys, values = pool()
    q = torch.randn(len(slots), H, D)
    out = attend_one(q, keys, values, slots, lengths, backend=backend)
    for number, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        expected = last_of_whole_row(q[number], keys[slot], values[slot], length)
        torch.testing.assert_close(out[number].double(), expected, rtol=1e-5, atol=1e-5)


def test_runs_read_nothing_behind_a_sequence() -> None:
    keys, values = pool()
    slots, lengths = [0, 1, 3], [4, 4, 9]
    expected = attend_one(torch.ones(3, H, D), keys, values, slots, lengths)
    for slot in range(P):
        end = lengths[slots.index(slot)] if slot in slots else 0
        keys[slot, :, end:] = values[slot, :, end:] = torch.nan
    out = attend_one(torch.ones(3, H, D), keys, values, slots, lengths)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(0, 33), (0, 1, 33), (0, 16, 17, 33), (0, 31, 32, 33)])
def test_any_pieces_give_the_whole(cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    keys, values = (torch.full((K, M, D), torch.nan, dtype=dtype) for _ in range(2))
    q, k, v = (torch.randn(33, heads, D).to(dtype) for heads in (H, K, K))
    parts = []
    for begin, end in pairwise(cuts):
        own = slice(begin, end)
        parts.append(attend_next(q[own], k[own], v[own], keys, values, begin))
        keys[:, own], values[:, own] = k[own].transpose(0, 1), v[own].transpose(0, 1)
    bounds = torch.tensor([0, 33], dtype=torch.int32)
    wide = (x.double() for x in (q, k, v))
    expected, _ = varlen_attention(*wide, bounds, backend="reference")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    found = torch.cat(parts)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, runs, masked, got 'pages'"):
        attend_one(torch.zeros(1, H, D), *pool(), [0], [1], backend="pages")
