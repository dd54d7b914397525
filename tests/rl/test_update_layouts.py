"""Updates on a stored batch: the same in every layout, micro-batch and packing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_m1.rl.batch import pack, samples_of
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.groups import parts
from megatron_m1.rl.token_loss import objective
from megatron_m1.rl.update import (
    add_old_logprobs,
    compared,
    comparison_metrics,
    metrics_over_ranks,
    own_rows,
    update,
)
from megatron_m1.training.run import Run
from megatron_m1.training.state import Training, build_model, data_rank
from parallel.layout import Layout
from tests.distributed import Pool
from tests.rl.stored import rl_config, stored_groups

LAYOUTS = {
    "tp2": (2, Layout(tp=2)),
    "tp2_no_sp": (2, Layout(tp=2, sequence_parallel=False)),
    "pp2": (2, Layout(pp=2)),
    "pp2_interleaved": (2, Layout(pp=2, vpp=2)),
    "ep2": (2, Layout(ep=2)),
    "dp2": (2, Layout()),
    "cp2": (2, Layout(cp=2)),
    "cp2_zigzag_tp2": (4, Layout(cp=2, cp_cut="zigzag", tp=2)),
    "tp2_pp2": (4, Layout(tp=2, pp=2)),
    "cp2_pp2": (4, Layout(cp=2, pp=2)),
}


class Updated(Run):
    """What an update asks of a run; RL has no rerun state machine."""

    def __post_init__(self) -> None:
        Training.__post_init__(self)


def updates(config: RLConfig) -> list[dict[str, float]]:
    """The metrics of each update on the stored batch."""
    config.parallel.build_groups()
    run = Updated(config, *build_model(config, config.train), None, 0)  # type: ignore[arg-type]
    minibatches = parts(stored_groups(), config.rl.updates_per_batch)
    rows = [
        own_rows(
            pack(
                samples_of(part, config.rl, 24),
                config.train.row_tokens,
                config.parallel,
                data_rank()[1],
            ),
            config.parallel,
        )
        for part in minibatches
    ]
    found = []
    for part in rows:
        add_old_logprobs(run.chunks, part)
        found.append(comparison_metrics(compared(part)))
    loss = objective(config.rl, 1.02)
    for part, metrics in zip(rows, found, strict=True):
        sums, norm = update(run, part, loss, 1e-2, 0.5)
        metrics |= {**metrics_over_ranks(sums), "norm": norm}
    return found


@pytest.fixture(scope="module")
def one_process(ranks: Callable[[int], Pool]) -> list[dict[str, float]]:
    return ranks(1).run(updates, rl_config("unused"))[0]


def assert_same(results: list[Any], expected: list[dict[str, float]]) -> None:
    for found in results:
        for step, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert one.keys() == other.keys()
            for name, value in other.items():
                assert one[name] == pytest.approx(value, rel=2e-4, abs=2e-6), (step, name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_follows_one_process(
    name: str, ranks: Callable[[int], Pool], one_process: list[dict[str, float]]
) -> None:
    size, layout = LAYOUTS[name]
    assert_same(ranks(size).run(updates, rl_config("unused", layout)), one_process)


@pytest.mark.parametrize("row_tokens", [1, 40, 1000])
def test_packing_changes_nothing(
    row_tokens: int, ranks: Callable[[int], Pool], one_process: list[dict[str, float]]
) -> None:
    config = rl_config("unused")
    config = replace(config, train=replace(config.train, row_tokens=row_tokens))
    assert_same(ranks(1).run(updates, config), one_process)
