"""A second try of steps whose loss is not finite."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.rerun_state_machine import Caller, RerunMode, RerunStateMachine
from torch import Tensor

from megatron_m1.config import RunConfig
from megatron_m1.training.metrics import step_metrics
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.distributed import Pool
from tests.training.small_run import small_config, start, weight_parts, write_data
from tests.training.test_not_finite import spoil_loss

WATCHED = ("train/loss", "optim/grad_norm", "train/aux_loss", "moe/max_violation", "optim/skipped")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def config_of(prefix: str, layout: Layout, rerun: str) -> RunConfig:
    config = small_config("unused", prefix, parallel=layout)
    return replace(config, train=replace(config.train, rerun=rerun))


def four_steps(config: RunConfig, is_spoiled: bool) -> dict[str, Any]:
    """With a wrong loss on the second process in the first try of the third step."""
    run = start(config)
    found = []
    for step in range(4):
        if is_spoiled and step == 2 and os.environ["RANK"] == "1":
            spoil_loss(run)
        metrics: dict[str, Any] = step_metrics(run, train_step(run), 1.0)
        found.append([metrics[name] for name in WATCHED])
    return {"steps": found, "weights": weight_parts(run)}


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=["dp2", "pp2"])
def test_an_error_of_the_device_leaves_no_trace(
    layout: Layout, ranks: Callable[[int], Pool], prefix: str
) -> None:
    expected = ranks(2).run(four_steps, config_of(prefix, layout, "disabled"), False)
    found = ranks(2).run(four_steps, config_of(prefix, layout, "validate_results"), True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["steps"] == theirs["steps"]
        for name, (_, _, part) in ours["weights"].items():
            assert torch.equal(part, theirs["weights"][name][2])


def test_without_it_the_step_is_skipped(ranks: Callable[[int], Pool], prefix: str) -> None:
    config = config_of(prefix, Layout(), "disabled")
    for result in ranks(2).run(four_steps, config, True):
        assert [step[-1] for step in result["steps"]] == [0, 0, 1, 1]


def passes(config: RunConfig) -> tuple[int, int]:
    """Forward passes of three steps, of which the last is wrong in every try, and the number of
    those that are skipped."""
    run = start(config)
    outputs = []

    def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach())
        return output * math.nan if run.progress.step == 2 else output

    run.chunks[-1].register_forward_hook(spoil)
    for _ in range(3):
        train_step(run)
    return len(outputs), run.progress.skipped


def test_an_error_of_the_step_is_skipped_after_the_second_try(
    ranks: Callable[[int], Pool], prefix: str
) -> None:
    """A step has two micro-batches on each process."""
    config = config_of(prefix, Layout(), "validate_results")
    assert ranks(2).run(passes, config) == [(2 + 2 + 4, 1)] * 2


def test_megatrons_report_is_still_broken() -> None:
    """Where this fails, ``train.rerun`` can offer it."""
    machine = RerunStateMachine(mode=RerunMode.REPORT_DETERMINISM_STATS)
    machine.stats[Caller("loss", 0)].record(0.0)
    machine.current_iteration = 0
    with pytest.raises(AttributeError, match="filename"):
        machine._maybe_report_stats()
