"""GPU-hours, dollars, and how fast answers are generated."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_m1.errors import ConfigError
from megatron_m1.planning import paper, price
from megatron_m1.planning.config import PlanConfig
from megatron_m1.planning.cost import step_cost
from megatron_m1.planning.memory import GIB
from megatron_m1.planning.rollout import decode_seconds, fullest, rollout

Make = Callable[..., PlanConfig]


def test_the_papers_rl_run(plan_for: Make) -> None:
    plan = plan_for("plan=h800").plan
    assert plan.gpus == paper.RL_GPUS
    found = price.of_days(plan, paper.RL_DAYS)
    assert found.gpu_hours == 258_048
    assert found.dollars == pytest.approx(paper.RL_DOLLARS, rel=1e-4)


def test_tokens_at_the_speed_of_a_step(plan_for: Make) -> None:
    config = plan_for("parallel=h800_m1", "plan=h100")
    cost = step_cost(config, config.plan)
    found = price.of_tokens(config.plan, cost, 3600 * cost.tokens)
    assert found.gpu_hours == pytest.approx(512 * cost.total)
    assert found.days == pytest.approx(cost.total / 24)
    assert found.dollars is None


def test_decoding_reads_the_weights_or_the_states(plan_for: Make) -> None:
    config = plan_for()
    one, many = (decode_seconds(config.model, config.plan, 16, batch, 1024) for batch in (1, 256))
    # A batch of one reads the two experts that it chose, 94 GB in all.
    read = 2 * (config.model.active_params() + 2 * config.model.vocab_size * 6144)
    assert one > read / (16 * 3.35e12)
    assert one < many < 20 * one
    long = decode_seconds(config.model, config.plan, 16, 256, 100_000)
    assert long > many


def test_weights_that_fill_a_node_take_two(plan_for: Make) -> None:
    """912 GB in BF16 are more than eight GPUs of 80 GB hold."""
    config = plan_for()
    found = rollout(config.model, config.plan, 10_000, 1024, 20_000)
    assert found.gpus == 16
    assert 0 < found.batch <= found.sequences
    assert rollout(config.model, plan_for("plan=h200").plan, 1, 1024, 20_000).gpus == 8
    assert fullest(config.model, plan_for("plan.nodes=1").plan, 1024, 20_000) is None
    with pytest.raises(ConfigError, match="plan.nodes=1 are too few to generate: the weights take"):
        rollout(config.model, plan_for("plan.nodes=1").plan, 1, 1024, 20_000)


def test_a_group_is_the_fewest_nodes_that_hold_it(plan_for: Make) -> None:
    """Any number of them: where the heads do not divide by the GPUs, the layers go over nodes."""
    model = plan_for().model
    tight = [f"plan.gpu_memory_gb={gb}" for gb in (45.9, 46.0)]
    # 850 GiB and 80 layers over 3 nodes: the fullest has 27, of which each GPU has an eighth.
    refused, held = (
        fullest(model, plan_for("plan.nodes=3", gb).plan, 1024, 20_000) for gb in tight
    )
    assert refused is None
    assert held is not None and held.gpus == 24
    assert held.memory["weights"] == pytest.approx(27 / 80 / 8 * 2 * 456.0897e9, rel=0.01)
    assert sum(held.memory.values()) <= 36 * GIB
    many = fullest(model, plan_for("plan.nodes=64", tight[0]).plan, 1024, 20_000)
    assert many is not None and many.gpus == 32


def test_a_full_group_has_no_room_left(plan_for: Make) -> None:
    config = plan_for()
    full = fullest(config.model, config.plan, 1024, 20_000)
    assert full is not None and full.batch == full.sequences
    limit = (80 - 10) * GIB
    one_more = (full.batch + 1) / full.batch
    states = full.memory["keys and values"] + full.memory["lightning states"]
    assert sum(full.memory.values()) <= limit < full.memory["weights"] + one_more * states
    assert full.memory["lightning states"] * full.gpus == full.batch * 280 * 2**20
    assert full.memory["keys and values"] * full.gpus == full.batch * 21_024 * 40_960


def test_a_round_generates_scores_and_trains(plan_for: Make) -> None:
    config = plan_for("parallel=h800_m1", "plan.rl.steps=10", "plan.rl.epochs=2")
    cost = step_cost(config, config.plan)
    found = price.of_rl(config, config.plan, cost)
    tokens = 512 * 16 * 21_024
    assert found.training == pytest.approx(2 * tokens / cost.tokens_per_second)
    assert found.scoring == pytest.approx(found.training / 6)
    assert found.generating > 20_000 * found.rollout.step_seconds
    round_seconds = found.generating + found.scoring + found.training
    assert found.price.gpu_hours == pytest.approx(10 * 512 * round_seconds / 3600)
