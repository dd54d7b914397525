from __future__ import annotations

import pytest

from megatron_m1.rl.samples import Response, Scored
from megatron_m1.rl.shaping import has_spread, overlong_penalty


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (150, -1)],
)
def test_overlong_penalty(length, penalty):
    assert overlong_penalty(length, 100, 20) == pytest.approx(penalty)
    assert overlong_penalty(length, 100, 20, factor=0.25) == pytest.approx(penalty / 4)


def test_overlong_penalty_at_its_edges():
    assert overlong_penalty(100, 100, 0) == 0
    assert overlong_penalty(50, 100, 100) == -0.5
    for buffer in (-1, 101):
        with pytest.raises(ValueError, match=f"the overlong buffer is {buffer}; give 0 to 100"):
            overlong_penalty(5, 100, buffer)


def scored(reward: float, failed: bool = False) -> Scored:
    return Scored(Response(0, 0, [], [], [], [], "stop"), reward, failed=failed)


def test_a_group_is_kept_when_two_of_its_rewards_differ():
    assert has_spread([scored(0), scored(1), scored(0)])
    assert not has_spread([scored(1), scored(1)])
    assert not has_spread([scored(0.1), scored(0.1), scored(0.1)])
    assert not has_spread([])


def test_failed_responses_do_not_keep_a_group():
    assert not has_spread([scored(1), scored(0, failed=True), scored(1)])
    assert not has_spread([scored(1), scored(float("nan"), failed=True)])
