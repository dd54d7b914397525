"""Whether a reward is suspected to pay for length."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron_m1.rl.rewards.config import LengthBiasConfig
from megatron_m1.rl.rewards.length_bias import LengthBias

CONFIG = LengthBiasConfig(window=10, growth=0.1, gain=0.01, correlation=0.1)


def watch(
    slope: float, growth: float, gain: float, steps: int = 10, seed: int = 1
) -> tuple[LengthBias, list[dict[str, float]]]:
    """Steps of 8 prompts with 8 responses each, whose reward rises with length by ``slope``."""
    draw, bias, found = random.Random(seed), LengthBias(CONFIG), []
    for step in range(steps):
        prompts = [prompt for prompt in range(8) for _ in range(8)]
        lengths = [(1 + growth * step) * draw.uniform(50, 150) for _ in prompts]
        rewards = [slope * length / 100 + draw.gauss(0, 0.3) for length in lengths]
        found.append(bias.observe(rewards, lengths, prompts, 0.5 + gain * step))
    return bias, found


def test_reward_for_length_without_gain_raises_the_alarm() -> None:
    _, found = watch(slope=1.0, growth=0.1, gain=0.0)
    assert [step["reward/length_alarm"] for step in found] == [0.0] * 9 + [1.0]
    assert found[-1]["reward/length_growth"] == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize(
    ("slope", "growth", "gain"), [(1.0, 0.1, 0.05), (1.0, 0.0, 0.0), (0.0, 0.1, 0.0)]
)
def test_no_alarm(slope: float, growth: float, gain: float) -> None:
    """The task gains; length does not grow; the reward does not go with length."""
    _, found = watch(slope, growth, gain)
    assert {step["reward/length_alarm"] for step in found} == {0.0}


def test_the_alarm_ends_when_length_no_longer_grows() -> None:
    bias, _ = watch(slope=1.0, growth=0.1, gain=0.0)
    found = [bias.observe([1.0, 2.0], [200, 201], [0, 0], 0.5) for _ in range(10)]
    assert found[-1]["reward/length_alarm"] == 0.0


def test_correlation_is_pearsons_within_prompts() -> None:
    draw = np.random.default_rng(2)
    lengths = draw.uniform(50, 150, 40)
    rewards = lengths / 100 + draw.normal(0, 0.3, 40)
    found = LengthBias(CONFIG).observe([*rewards], [*lengths], [0] * 40, 0.0)
    expected = np.corrcoef(rewards, lengths)[0, 1]
    assert found["reward/length_correlation"] == pytest.approx(expected)


def test_hard_prompts_with_long_responses_are_no_bias() -> None:
    rewards, lengths = [0.0, 0.0, 1.0, 1.0], [10, 12, 100, 102]
    found = LengthBias(CONFIG).observe(rewards, lengths, ["a", "a", "b", "b"], 0.0)
    assert found["reward/length_correlation"] == 0.0
    mixed = LengthBias(CONFIG).observe(rewards, lengths, ["a"] * 4, 0.0)
    assert mixed["reward/length_correlation"] > 0.9


def test_nothing_to_look_at() -> None:
    bias = LengthBias(CONFIG)
    assert set(bias.observe([], [], [], 0.0).values()) == {0.0}
    assert bias.observe([1.0], [5], ["a"], 0.0)["reward/length_correlation"] == 0.0


def test_uneven_arguments() -> None:
    with pytest.raises(ValueError, match="1 rewards, 2 lengths and 1 prompts"):
        LengthBias(CONFIG).observe([1.0], [5, 6], ["a"], 0.0)


def test_it_goes_on_after_a_resume() -> None:
    whole, expected = watch(slope=1.0, growth=0.1, gain=0.0, steps=10)
    half, _ = watch(slope=1.0, growth=0.1, gain=0.0, steps=6)
    resumed = LengthBias(CONFIG)
    resumed.load_state_dict(half.state_dict())
    for bias in (half, resumed):
        assert bias.state_dict() == half.state_dict()
    given = ([1.0, 2.0], [300, 400], [0, 0], 0.5)
    assert resumed.observe(*given) == half.observe(*given)
    assert expected[-1]["reward/length_alarm"] == 1.0
    assert whole.state_dict() != half.state_dict()
