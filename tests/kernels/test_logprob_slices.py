"""Slices of the vocabulary, as tensor-parallel ranks hold them, against the whole of it."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.logprob import Partial, Totals, VocabSlice, merge, slice_backward, slice_forward
from tests.kernels.logprob_cases import assert_close, chunks_of, make_inputs, run, run_sum

CUTS = [[0, 23], [0, 1, 23], [0, 9, 22, 23], [0, 2, 11, 15, 23]]


def cut(weight: Tensor, bounds: list[int]) -> Iterator[tuple[int, Tensor]]:
    return ((begin, weight[begin:end]) for begin, end in pairwise(bounds))


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("bounds", CUTS, ids=str)
@pytest.mark.parametrize("spread", [3.0, 3e3])
def test_slices_of_the_vocabulary_make_the_whole(
    bounds: list[int], with_entropy: bool, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(4, monkeypatch)
    hidden, weight, targets = make_inputs(10, 6, bounds[-1], spread=spread)
    options: dict[str, Any] = {"with_entropy": with_entropy, "product_dtype": torch.float64}
    whole = merge(
        [
            slice_forward(hidden, part, targets, first_token=first, **options)
            for first, part in cut(weight, bounds)
        ]
    )
    alone = merge([slice_forward(hidden, weight, targets, **options)])
    for actual, expected in zip(whole, alone, strict=True):
        if expected is None:
            assert actual is None
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    upstream = torch.randn(2, 10, dtype=torch.float64)
    d_entropy = upstream[1] if with_entropy else None

    def gradients(first: int, part: Tensor, of: Totals) -> tuple[Tensor, Tensor]:
        return slice_backward(
            upstream[0],
            d_entropy,
            hidden,
            part,
            targets,
            of,
            first_token=first,
            product_dtype=torch.float64,
        )

    parts = [gradients(first, part, whole) for first, part in cut(weight, bounds)]
    d_hidden, d_weight = gradients(0, weight, alone)
    bound = {"rtol": 1e-9, "atol": 1e-12 * spread}
    torch.testing.assert_close(sum(part[0] for part in parts), d_hidden, **bound)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), d_weight, **bound)


@pytest.mark.parametrize("bounds", CUTS, ids=str)
def test_slices_that_combine(bounds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As ranks do that each hold a slice. The sum combines chunk by chunk."""
    chunks_of(4, monkeypatch)
    hidden, weight, targets = make_inputs(10, 6, bounds[-1])
    token_weights = torch.rand(10, dtype=torch.float64)
    spans = [slice(0, 4), slice(4, 8), slice(8, 10)]

    def partials_of(span: slice) -> list[Partial]:
        return [
            slice_forward(
                hidden[span],
                part,
                targets[span],
                first_token=first,
                with_entropy=True,
                product_dtype=torch.float64,
            )
            for first, part in cut(weight, bounds)
        ]

    whole = merge(partials_of(slice(None)))
    found, sums = [], []
    for first, part in cut(weight, bounds):
        vocab_slice = VocabSlice(first, lambda _: whole)
        found.append(run(hidden, part, targets, vocab_slice=vocab_slice))
        answers = iter([merge(partials_of(span)) for span in spans])
        vocab_slice = VocabSlice(first, lambda _, answers=answers: next(answers))
        sums.append(run_sum(hidden, part, targets, token_weights, vocab_slice=vocab_slice))

    for parts, expected in (
        (found, run(hidden, weight, targets)),
        (sums, run_sum(hidden, weight, targets, token_weights)),
    ):
        actual = {
            **parts[-1],
            "d_hidden": torch.stack([part["d_hidden"] for part in parts]).sum(0),
            "d_weight": torch.cat([part["d_weight"] for part in parts]),
        }
        assert_close(actual, expected, 1e-11)
