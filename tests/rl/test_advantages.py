from __future__ import annotations

import pytest
import torch

from megatron_m1.rl.advantages import group_advantages


def test_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 5.0, 3.0, 1.0])
    found = group_advantages(rewards, torch.tensor([3, 3, 3, 0, 0, 0]))
    spread = (1 / 3) ** 0.5
    expected = [2 / 3 / spread, -1 / 3 / spread, -1 / 3 / spread, 1, 0, -1]
    assert found.tolist() == pytest.approx(expected)
    assert found.dtype == torch.float32


def test_scale_and_shift_of_rewards_change_nothing():
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompts = torch.arange(12) % 3
    found = group_advantages(rewards, prompts)
    assert torch.allclose(found, group_advantages(1e-9 * rewards, prompts), atol=1e-5)
    assert torch.allclose(found, group_advantages(7 * rewards - 5, prompts), atol=1e-5)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -1e9])
@pytest.mark.parametrize("size", [1, 3, 6, 7])
def test_a_group_without_spread_has_no_advantage(reward, size):
    # The mean of equal numbers may be another number: divided by its spread, that would be 1.
    rewards = torch.full((size,), reward, dtype=torch.float64)
    prompts = torch.zeros(size, dtype=torch.int64)
    assert group_advantages(rewards, prompts).tolist() == [0] * size
    valid = torch.arange(size) > 0
    assert group_advantages(rewards, prompts, valid).tolist() == [0] * size


def test_responses_without_a_reward_count_in_no_group():
    rewards = torch.tensor([1.0, float("nan"), 3.0, 0.0, 1.0])
    prompts = torch.tensor([0, 0, 0, 1, 1])
    valid = torch.tensor([True, False, True, True, False])
    found = group_advantages(rewards, prompts, valid)
    assert found.tolist() == pytest.approx([-(0.5**0.5), 0, 0.5**0.5, 0, 0])


def test_what_is_refused():
    prompts = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="the reward of response 1 is nan"):
        group_advantages(torch.tensor([1.0, float("nan")]), prompts)
    with pytest.raises(ValueError, match=r"must have one shape, got \[3\], \[2\], \[3\]"):
        group_advantages(torch.ones(3), prompts)
