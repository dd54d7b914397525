"""Rollouts that do not tell all of their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_m1.rl.batch import OLD, ROLLOUT, pack, samples_of
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.groups import Group, parts
from megatron_m1.rl.metrics import response_lengths
from megatron_m1.rl.samples import Prompt, Response, Scored
from megatron_m1.rl.update import (
    add_old_logprobs,
    compared,
    comparison_metrics,
    own_rows,
    take_rollout_logprobs,
)
from megatron_m1.training.state import build_model, data_rank
from parallel.layout import Layout
from tests.distributed import Pool
from tests.rl.stored import rl_config, stored_groups


def forget(groups: list[Group], prompts: list[int]) -> None:
    """Make the log-probabilities of prompts' responses unknown."""
    for group in groups:
        if group.prompt.id in prompts:
            for one in group.scored:
                one.response.raw_logprobs = [math.nan] * len(one.response.tokens)


def compare(config: RLConfig, prompts: list[int], keep: int) -> dict[str, Any]:
    """The metrics of the first groups, and what the old log-probabilities are then taken to be."""
    config.parallel.build_groups()
    _, chunks, _ = build_model(config, config.train)
    groups = stored_groups()[:keep]
    forget(groups, prompts)
    (part,) = parts(groups, 1)
    packed = pack(samples_of(part, config.rl, 24), 64, config.parallel, data_rank()[1])
    rows = own_rows(packed, config.parallel)
    add_old_logprobs(chunks, rows)
    metrics = comparison_metrics(compared(rows))
    trainer = [row.extra.get(OLD) for row in rows]
    take_rollout_logprobs(rows)
    is_taken = []
    for row, before in zip(rows, trainer, strict=True):
        if before is not None:
            told, live = row.extra[ROLLOUT], row.loss_mask != 0
            known, unknown = live & ~told.isnan(), live & told.isnan()
            old = row.extra[OLD]
            is_taken += [bool((old[known] == told[known]).all())]
            is_taken += [bool((old[unknown] == before[unknown]).all())]
    return {"metrics": metrics, "is_taken": all(is_taken), "tokens": tokens(groups)}


def tokens(groups: list[Group]) -> dict[int, int]:
    return {
        group.prompt.id: sum(len(one.response.tokens) for one in group.scored) for group in groups
    }


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=["dp2", "pp2"])
def test_the_trainers_stand_for_them(layout: Layout, ranks: Callable[[int], Pool]) -> None:
    config = rl_config("unused", layout)
    (known,) = ranks(1).run(compare, rl_config("unused"), [], 2)
    for found in ranks(2).run(compare, config, [2, 3], 4):
        assert found["is_taken"]
        count = found["tokens"]
        share = (count[2] + count[3]) / sum(count.values())
        metrics = found["metrics"]
        assert metrics["training/rollout_logprobs_missing"] == pytest.approx(share)
        assert math.isfinite(metrics["actor/entropy"])
        # What is compared are the others, as if they were alone.
        for name, value in known["metrics"].items():
            if name.startswith(("rollout_corr", "training/rollout_probs")):
                assert metrics[name] == pytest.approx(value, rel=1e-4), name


def test_without_any_nothing_is_compared(ranks: Callable[[int], Pool]) -> None:
    (found,) = ranks(1).run(compare, rl_config("unused"), [0, 1, 2, 3], 4)
    assert found["is_taken"]
    assert found["metrics"].keys() == {"actor/entropy", "training/rollout_logprobs_missing"}
    assert found["metrics"]["training/rollout_logprobs_missing"] == 1


def test_perplexity_is_of_those_that_are_known() -> None:
    response = Response(0, 0, [1, 2], [-1.0, -1.0], [-1.0, math.nan], [0, 0], "stop")
    judged = [(Prompt(0, "", "", None), Scored(response, 1.0))]
    assert response_lengths(judged, 9)["rollout/perplexity"] == pytest.approx(math.e)
    unknown = replace(response, raw_logprobs=[math.nan] * 2)
    judged = [(Prompt(0, "", "", None), Scored(unknown, 1.0))]
    assert "rollout/perplexity" not in response_lengths(judged, 9)
