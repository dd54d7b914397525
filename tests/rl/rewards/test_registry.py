"""Which verifier a data source has."""

from __future__ import annotations

import pytest

from megatron_m1.errors import InputError
from megatron_m1.rl import tasks
from megatron_m1.rl.rewards.config import CodeConfig, RewardConfig, VerifierConfig
from megatron_m1.rl.rewards.registry import HERE, PROCESS, THREAD, Registry

PLAIN = Registry(RewardConfig())


@pytest.mark.parametrize(
    ("data_source", "use"),
    [
        ("openai/gsm8k", "math"),
        ("lighteval/MATH", "math"),
        ("DigitalLearningGmbH/MATH-lighteval", "math"),
        ("math_dapo", "math"),
        ("aime2024", "math"),
        ("numina_olympiads", "math"),
        ("codecontests", "code"),
        ("taco", "code"),
        ("swe-gym", "software"),
        ("grade/general", "grade"),
        ("compare/writing", "compare"),
    ],
)
def test_what_ships_with_the_project(data_source: str, use: str) -> None:
    assert PLAIN.verifier(data_source).use == use


def test_every_generated_task_is_judged_at_once() -> None:
    assert {PLAIN.verifier(name).place for name in tasks.TASKS} == {HERE}
    assert PLAIN.function("arithmetic") is tasks.compute_score


def test_places() -> None:
    assert PLAIN.verifier("grade/x").place == THREAD
    assert PLAIN.verifier("openai/gsm8k").place == PROCESS


def test_programs_have_their_own_time() -> None:
    registry = Registry(RewardConfig(code=CodeConfig(seconds=33.0)))
    assert registry.verifier("apps").seconds == 33.0
    assert registry.verifier("openai/gsm8k").seconds == 0.0


@pytest.mark.parametrize("data_source", ["", "unheard", "apps2", "Openai/gsm8k", "grade"])
def test_an_unknown_data_source(data_source: str) -> None:
    with pytest.raises(InputError, match=f"data_source={data_source}: name one in reward.verif"):
        PLAIN.verifier(data_source)


def test_what_is_configured_goes_first() -> None:
    entries = [
        VerifierConfig("*", "function", file="all.py"),
        VerifierConfig("math_*", "code"),
        VerifierConfig("math_hard*", "software"),
        VerifierConfig("math_harder", "grade"),
        VerifierConfig("trl*", "function", file="trl.py", style="trl"),
    ]
    registry = Registry(RewardConfig(verifiers=entries))
    used = {
        name: registry.verifier(name).use
        for name in ("math_harder", "math_hardest", "math_easy", "math", "arithmetic")
    }
    assert used == {
        "math_harder": "grade",
        "math_hardest": "software",
        "math_easy": "code",
        "math": "function",
        "arithmetic": "function",
    }
    assert registry.verifier("trl_set").wants_tokens
    assert not registry.verifier("other").wants_tokens
