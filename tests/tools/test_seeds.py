"""tools/seeds.py against values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tools.seeds import bootstrap_interval, first_reaching, half_interval, trailing_mean

POSITIONS = np.array([0, 16, 32, 48])


def test_trailing_mean_begins_with_what_there_is() -> None:
    curves = np.array([[1.0, 3.0, 5.0, 9.0], [0.0, 0.0, 6.0, 0.0]])
    assert trailing_mean(curves, 2).tolist() == [[1, 2, 4, 7], [0, 0, 3, 3]]
    assert trailing_mean(curves, 1).tolist() == curves.tolist()


def test_trailing_mean_of_a_window_beyond_the_curve_is_that_of_all() -> None:
    assert trailing_mean(np.array([1.0, 3.0, 5.0]), 9).tolist() == [1, 2, 3]


def test_the_level_itself_is_reached() -> None:
    assert first_reaching(POSITIONS, np.array([0.1, 0.5, 0.4, 0.6]), 0.5) == 16


def test_a_level_above_the_curve_is_never_reached() -> None:
    assert first_reaching(POSITIONS, np.array([0.1, 0.5, 0.4, 0.6]), 0.7) == math.inf


def test_half_interval_is_students() -> None:
    # t of 4 degrees of freedom times 1.5811 / sqrt(5).
    assert half_interval(np.array([1.0, 2, 3, 4, 5])) == pytest.approx(1.963, abs=1e-3)
    # 97.5 % of the standard normal distribution lie below 1.96; t of 99 degrees is 1.984.
    many = np.tile([-1.0, 1.0], 50)
    assert half_interval(many) == pytest.approx(0.1 * 1.984 * math.sqrt(100 / 99), rel=0.05)


def test_half_interval_of_every_point() -> None:
    assert half_interval(np.array([[1.0, 2.0], [1.0, 4.0]])) == pytest.approx([0, 12.706])


def test_one_seed_tells_nothing() -> None:
    one, two = np.array([1.0]), np.array([1.0, 2.0])
    assert half_interval(one) == math.inf
    assert bootstrap_interval(lambda a, b: np.mean(a - b), two, one) == (-math.inf, math.inf)


def test_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    sample = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(np.mean, sample, draws=2000)
    width = 1.96 * sample.std() / math.sqrt(400)
    assert low == pytest.approx(sample.mean() - width, abs=0.2 * width)
    assert high == pytest.approx(sample.mean() + width, abs=0.2 * width)


def test_bootstrap_draws_every_sample_by_itself() -> None:
    sample = np.array([0.0, 1.0])
    together = bootstrap_interval(lambda one, other: np.mean(one - other), sample, sample)
    assert together == (-1, 1)


def test_bootstrap_is_the_same_every_time() -> None:
    sample = np.random.default_rng(2).normal(size=5)
    assert bootstrap_interval(np.mean, sample) == bootstrap_interval(np.mean, sample)


def test_what_is_seldom_reached_has_no_upper_end() -> None:
    # All seeds but one reach it, and one bad seed of five is drawn in two draws of three.
    curves = np.array([[1.0, 9.0]] * 4 + [[1.0, -99.0]])

    def reaches(sample: np.ndarray) -> float:
        return first_reaching(np.array([0, 16]), sample.mean(axis=0), 5)

    assert bootstrap_interval(reaches, curves, draws=500) == (16, math.inf)
