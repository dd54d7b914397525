"""Rates and batches against MiniMax-Text-01's published schedule, and the ends of each shape."""

from __future__ import annotations

import pytest

from megatron_m1.config import BatchPhase, LrPhase, OptimConfig, RunConfig, TrainConfig
from megatron_m1.config_loading import load
from megatron_m1.training import phases

B, T = 10**9, 10**12
END = 11_400 * B


@pytest.fixture(scope="module")
def text01() -> RunConfig:
    return load("pretrain", RunConfig, ["optim=text01", "train=text01"])


@pytest.mark.parametrize(
    ("step", "tokens", "rate"),
    [
        (0, 0, 2e-4 / 500),
        (249, 0, 1e-4),
        (499, 0, 2e-4),
        (10_000, 7_200 * B - 1, 2e-4),
        (10_000, 7_200 * B, 1.3e-4),
        (10_000, 10_400 * B - 1, 1.3e-4),
        (10_000, 10_900 * B, (1.3e-4 * 3e-5) ** 0.5),
        (10_000, END, 3e-5),
        (10_000, END + B, 3e-5),
    ],
)
def test_text01_rates(text01: RunConfig, step: int, tokens: int, rate: float) -> None:
    assert phases.learning_rate(text01.optim, step, tokens, END) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        (0, 2048),
        (69 * B - 1, 2048),
        (69 * B, 4096),
        (790 * B - 1, 4096),
        (790 * B, 8192),
        (4_700 * B - 1, 8192),
        (4_700 * B, 16384),
        (END, 16384),
    ],
)
def test_text01_batches(text01: RunConfig, tokens: int, rows: int) -> None:
    assert phases.global_batch(text01.train, tokens) == rows


def test_text01_ends_after_its_tokens(text01: RunConfig) -> None:
    assert phases.total_tokens(text01.train) == END
    assert 120_000 < phases.total_steps(text01.train) < 140_000


@pytest.mark.parametrize(
    ("shape", "first", "middle", "last"),
    [
        ("constant", 1.0, 1.0, 1.0),
        ("linear", 1.0, 0.505, 0.01),
        ("cosine", 1.0, 0.505, 0.01),
        ("exponential", 1.0, 0.1, 0.01),
    ],
)
def test_shapes(shape: str, first: float, middle: float, last: float) -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.01, shape=shape)
    rates = [phases.learning_rate(optim, 0, tokens, 1000) for tokens in (0, 500, 1000)]
    assert rates == pytest.approx([first, middle, last])


def test_cosine_falls_slowly_first() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.0, shape="cosine")
    assert phases.learning_rate(optim, 0, 250, 1000) == pytest.approx((1 + 0.5**0.5) / 2)


def test_phases_follow_one_another() -> None:
    optim = OptimConfig(
        phases=[LrPhase(100, 1.0, 3.0, "linear"), LrPhase(50, 5.0)], warmup_steps=2, lr=9.0
    )
    rates = [phases.learning_rate(optim, 10, tokens, 0) for tokens in (0, 50, 100, 149, 1000)]
    assert rates == pytest.approx([1, 2, 5, 5, 5])
    assert phases.learning_rate(optim, 0, 50, 0) == pytest.approx(1)


def walked(train: TrainConfig) -> tuple[int, int]:
    """Steps and tokens, one step at a time."""
    steps = tokens = 0
    while steps < train.steps if train.steps is not None else tokens < (train.tokens or 0):
        tokens += phases.global_batch(train, tokens) * train.seq_length
        steps += 1
    return steps, tokens


@pytest.mark.parametrize("length", [{"steps": 1}, {"steps": 23}, {"tokens": 1}, {"tokens": 999}])
@pytest.mark.parametrize(
    "batches", [[], [(0, 3)], [(40, 5), (90, 2)], [(90, 2), (40, 5), (91, 7)], [(10_000, 4)]]
)
def test_length_is_that_of_the_single_steps(
    length: dict[str, int], batches: list[tuple[int, int]]
) -> None:
    train = TrainConfig(
        global_batch=2,
        seq_length=7,
        batch_phases=[BatchPhase(start, rows) for start, rows in batches],
        **length,
    )
    steps, tokens = walked(train)
    assert phases.total_steps(train) == steps
    assert phases.total_tokens(train) == (train.tokens or tokens)


def test_length_of_a_long_run_of_small_steps_is_arithmetic() -> None:
    train = TrainConfig(tokens=T, global_batch=1, seq_length=1)
    assert phases.total_steps(train) == T
