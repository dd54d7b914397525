from __future__ import annotations

import pytest
import torch

from megatron_m1.rl.token_sums import TokenSums


def sums(values: list[float], live: list[bool] | None = None) -> TokenSums:
    tokens = torch.tensor(values)
    mask = torch.ones_like(tokens, dtype=torch.bool) if live is None else torch.tensor(live)
    return TokenSums.of(mask, {"mean": tokens}, max={"max": tokens}, min={"min": tokens})


def test_means_and_extremes_are_of_live_tokens_only():
    found = sums([1.0, float("nan"), 3.0, 100.0], [True, False, True, False])
    assert found.metrics() == {"mean": 2.0, "max": 3.0, "min": 1.0}


def test_parts_merge_to_the_whole():
    parts = [sums([1.0, 2.0]), sums([5.0], [False]), sums([]), sums([-3.0])]
    assert TokenSums.merged(parts).metrics() == sums([1.0, 2.0, -3.0]).metrics()


def test_no_token_makes_no_metric():
    assert sums([]).metrics() == {}
    assert TokenSums.merged([sums([]), sums([7.0], [False])]).metrics() == {}


def test_many_small_numbers_are_added_exactly_enough():
    found = sums([0.1] * 100_000).metrics()
    assert found["mean"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)
