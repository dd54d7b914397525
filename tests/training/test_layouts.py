"""From the same weights and data, every layout trains the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed import Pool
from tests.training.small_run import LAYOUTS, curve, small_config, whole_weights, write_data

STORED = [4.491764, 3.590025, 3.086752, 2.706992, 2.677501]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one_process(ranks: Callable[[int], Pool], prefix: str) -> list[dict[str, Any]]:
    return ranks(1).run(curve, small_config("unused", prefix))


def assert_same(results: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["losses"] == pytest.approx(expected[0]["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(expected[0]["norms"], rel=1e-5)
    whole = whole_weights(results)
    for name, weight in whole_weights(expected).items():
        torch.testing.assert_close(whole[name], weight, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_follows_one_process(
    name: str, ranks: Callable[[int], Pool], prefix: str, one_process: list[dict[str, Any]]
) -> None:
    size, layout = LAYOUTS[name]
    config = replace(small_config("unused", prefix), parallel=layout)
    assert_same(ranks(size).run(curve, config), one_process)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["tp2_sp", "pp2_interleaved", "cp2_ep2"])
def test_recomputation_changes_nothing(
    recompute: str,
    name: str,
    ranks: Callable[[int], Pool],
    prefix: str,
    one_process: list[dict[str, Any]],
) -> None:
    size, layout = LAYOUTS[name]
    config = replace(small_config("unused", prefix), parallel=layout)
    train = replace(config.train, recompute=recompute, recompute_modules=["core_attn", "moe"])
    assert_same(ranks(size).run(curve, replace(config, train=train)), one_process)


def test_overlapped_communication_changes_nothing(
    ranks: Callable[[int], Pool], prefix: str, one_process: list[dict[str, Any]]
) -> None:
    config = small_config("unused", prefix)
    optim = replace(config.optim, overlap_grad_reduce=True, overlap_param_gather=True)
    assert_same(ranks(2).run(curve, replace(config, optim=optim)), one_process)


def test_plain_optimizer_equals_the_distributed_one(
    ranks: Callable[[int], Pool], prefix: str, one_process: list[dict[str, Any]]
) -> None:
    config = small_config("unused", prefix)
    optim = replace(config.optim, distributed=False)
    assert_same(ranks(2).run(curve, replace(config, optim=optim)), one_process)


def test_the_curve_is_the_stored_one(one_process: list[dict[str, Any]]) -> None:
    """A change that is meant to train otherwise stores its own curve; no other may leave this."""
    assert one_process[0]["losses"] == pytest.approx(STORED, rel=1e-4)
