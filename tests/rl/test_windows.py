"""When the output window grows."""

from __future__ import annotations

import re

import pytest

from megatron_m1.rl.windows import Windows, WindowsConfig

CONFIG = WindowsConfig(stages=[40, 48, 56], stretch=3, perplexity_change=0.02, length_share=0.9)


def steps_until_next(windows: Windows, perplexities: list[float], length: float) -> int | None:
    """After how many of the steps the stage changes."""
    for count, perplexity in enumerate(perplexities, 1):
        if windows.observe(perplexity, length):
            return count
    return None


def test_a_stage_ends_when_perplexity_has_converged_and_lengths_near_the_window() -> None:
    windows = Windows(CONFIG, fixed=7)
    assert windows.tokens == 40
    assert steps_until_next(windows, [2.0] * 10, length=37) == 6
    assert windows.tokens == 48


def test_falling_perplexity_keeps_the_stage() -> None:
    windows = Windows(CONFIG, fixed=7)
    assert steps_until_next(windows, [2.0 * 0.97**i for i in range(20)], length=40) is None


def test_rising_perplexity_keeps_the_stage() -> None:
    windows = Windows(CONFIG, fixed=7)
    assert steps_until_next(windows, [2.0 * 1.02**i for i in range(20)], length=40) is None


def test_short_responses_keep_the_stage() -> None:
    windows = Windows(CONFIG, fixed=7)
    assert steps_until_next(windows, [2.0] * 20, length=35.9) is None


def test_a_new_stage_forgets_what_the_last_one_showed() -> None:
    windows = Windows(CONFIG, fixed=7)
    assert steps_until_next(windows, [2.0] * 6, length=40) == 6
    assert steps_until_next(windows, [2.0] * 6, length=44) == 6
    assert windows.tokens == 56


def test_the_last_stage_stays() -> None:
    windows = Windows(WindowsConfig(stages=[40], stretch=1), fixed=7)
    assert steps_until_next(windows, [2.0] * 9, length=40) is None


def test_without_stages_the_window_is_fixed() -> None:
    windows = Windows(WindowsConfig(), fixed=7)
    assert windows.tokens == 7
    assert not windows.observe(2.0, 7)


def test_a_resumed_run_changes_stage_at_the_same_step() -> None:
    whole, first = Windows(CONFIG, fixed=7), Windows(CONFIG, fixed=7)
    shown = [3.0, 2.5, 2.2, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1]
    changes = [whole.observe(value, 38) for value in shown]
    assert changes.count(True) == 1
    cut = changes.index(True) - 2
    resumed = Windows(CONFIG, fixed=7)
    kept = [first.observe(value, 38) for value in shown[:cut]]
    resumed.load_state_dict(first.state_dict())
    assert kept + [resumed.observe(value, 38) for value in shown[cut:]] == changes


def test_stages_that_changed_since_the_checkpoint() -> None:
    windows = Windows(CONFIG, fixed=7)
    steps_until_next(windows, [2.0] * 6, length=40)
    other = Windows(WindowsConfig(stages=[32, 44, 64]), fixed=7)
    other.load_state_dict(windows.state_dict())
    assert other.tokens == 44


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [48, 40]}, "rl.windows.stages=\\[48, 40\\] must rise"),
        ({"stretch": 0}, "rl.windows.stretch=0 must be at least 1"),
        ({"perplexity_change": 0.0}, "must be positive"),
        ({"length_share": 1.5}, "must be in"),
    ],
)
def test_problems(change: dict, message: str) -> None:
    (problem,) = WindowsConfig(**change).problems()
    assert re.search(message, problem)
