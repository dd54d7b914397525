"""The product of few rows is a product."""

import pytest
import torch

from kernels.few_rows import few_rows_linear


@pytest.mark.parametrize("rows", [0, 1, 2, 8, 9, 64, 65])
@pytest.mark.parametrize("features", [3, 30_000])
def test_it_is_the_product(rows: int, features: int) -> None:
    x, weight = torch.randn(rows, 1, 40), torch.randn(features, 40)
    y = few_rows_linear(x, weight)
    assert y.is_contiguous()
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-4)


def test_strided_rows() -> None:
    x, weight = torch.randn(40, 4).T, torch.randn(5, 40)
    torch.testing.assert_close(few_rows_linear(x, weight), x @ weight.T, rtol=1e-5, atol=1e-5)
