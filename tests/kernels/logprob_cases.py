"""Inputs of the log-probability kernel, its outputs and gradients, and how close they must be."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.logprob import slices, summed_cross_entropy, token_logprobs
from tests.kernels.compare import outputs_and_gradients

NAMES = ("logprobs", "entropy", "d_hidden", "d_weight")


def chunks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test, chunks are of so many tokens."""
    monkeypatch.setattr(slices, "CHUNK_BYTES", 0)
    monkeypatch.setattr(slices, "LEAST_ROWS", rows)


def make_inputs(
    T: int, C: int, V: int, dtype: torch.dtype = torch.float64, spread: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets; the logits have a standard deviation of `spread`."""
    hidden = torch.randn(T, C, dtype=torch.float64) * spread * C**-0.5
    weight = torch.randn(V, C, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), torch.randint(V, (T,))


def run(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> dict[str, Tensor]:
    outputs, gradients = outputs_and_gradients(
        lambda hidden, weight: token_logprobs(hidden, weight, targets, **options),
        (hidden, weight),
    )
    return dict(zip(NAMES, outputs + gradients, strict=True))


def run_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, **options: Any
) -> dict[str, Tensor]:
    (total,), gradients = outputs_and_gradients(
        lambda *x: summed_cross_entropy(*x, targets, token_weights, **options), (hidden, weight)
    )
    return dict(zip(("total", *NAMES[2:]), [total, *gradients], strict=True))


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float, typical: float = 0.0
) -> None:
    """Every row, be it a token's or a vocabulary entry's, is close by itself; where rows are small
    because 1 - p is, to `typical` of the mean row."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.shape == expected[name].shape
        if tensor.numel() == 0:
            continue
        found, truth = (
            x.detach().double().reshape(len(x) if x.dim() else 1, -1)
            for x in (tensor, expected[name])
        )
        size = truth.norm(dim=1)
        scale = size.clamp(min=max(1e-30, typical * size.mean().item()))
        error = ((found - truth).norm(dim=1) / scale).max().item()
        assert error <= bound, f"{name}: {error:.1e} > {bound:.0e}"
