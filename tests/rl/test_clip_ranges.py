from __future__ import annotations

import math

import pytest

from megatron_m1.rl.clip_ranges import ClipRange, from_cap, from_cap_delta, from_deltas


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.2, 0.2, (0.8, 1.2)),  # verl's and NeMo-RL's defaults
        (10, 0.2, (0, 1.2)),  # verl's example
        (1.0, 4.0, (0, 5)),  # SkyRL's default, and what slime suggests
        (1.0, 5.0, (0, 6)),  # NeMo-RL's recipe
        (0, 0, (1, 1)),
    ],
)
def test_from_deltas(low, high, expected):
    found = from_deltas(low, high)
    assert (found.min, found.max) == pytest.approx(expected)


def test_from_caps():
    assert from_cap(5.0) == ClipRange(0.0, 5.0)
    assert from_cap(math.inf) == ClipRange(0.0, math.inf)
    found = from_cap_delta(0.272)
    assert (found.min, found.max) == pytest.approx((0, 1.272))


@pytest.mark.parametrize("cap", [0.2, 0.999, 0, -1, math.nan])
def test_a_cap_below_one_is_refused(cap):
    with pytest.raises(ValueError, match=f"upper bound of importance weights is {cap}, which cuts"):
        from_cap(cap)
    with pytest.raises(ValueError, match="give an absolute bound of at least 1"):
        ClipRange(0.0, cap)


@pytest.mark.parametrize("low", [-0.1, 1.01, math.nan])
def test_a_lower_bound_out_of_range_is_refused(low):
    with pytest.raises(ValueError, match=f"lower bound of importance weights is {low}"):
        ClipRange(low, 5.0)


@pytest.mark.parametrize(("low", "high", "name"), [(-1, 1, "low"), (1, -0.1, "high")])
def test_negative_distances_are_refused(low, high, name):
    with pytest.raises(ValueError, match=f"the {name} distance to 1 is"):
        from_deltas(low, high)
    with pytest.raises(ValueError, match="the high distance to 1 is nan"):
        from_cap_delta(math.nan)
