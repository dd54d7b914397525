"""What keeps rewards from being computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_m1.rl.rewards.config import (
    CodeConfig,
    GenerativeConfig,
    LengthBiasConfig,
    RewardConfig,
    VerifierConfig,
    reward_problems,
)
from megatron_m1.rl.sandbox.config import Limits, SandboxConfig


def test_the_defaults_are_sound() -> None:
    assert reward_problems(RewardConfig()) == []


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (RewardConfig(slots=0), "reward.slots=0 must be positive"),
        (RewardConfig(seconds=-1.0), "reward.seconds=-1.0 must be positive"),
        (
            RewardConfig(sandbox=SandboxConfig(kind="docker")),
            "reward.sandbox.kind=docker is not one of bubblewrap, rlimits",
        ),
        (
            RewardConfig(code=CodeConfig(credit="some")),
            "reward.code.credit=some is not one of all, rate",
        ),
        (
            RewardConfig(code=CodeConfig(limits=Limits(memory_mb=0))),
            "reward.code.limits.memory_mb=0 must be positive",
        ),
        (
            RewardConfig(generative=GenerativeConfig(url="localhost:1")),
            "reward.generative.url=localhost:1 must begin with http(s)://",
        ),
        (
            RewardConfig(generative=GenerativeConfig(length_bias=LengthBiasConfig(window=1))),
            "reward.generative.length_bias.window must be at least 2",
        ),
        (
            RewardConfig(verifiers=[VerifierConfig("x", "chess")]),
            "reward.verifiers[0].use=chess is not one of math, code, software, grade, compare, "
            "function",
        ),
        (
            RewardConfig(verifiers=[VerifierConfig("x", "math"), VerifierConfig("", "math")]),
            "reward.verifiers[1].data_source is missing: give a data source, or * for all",
        ),
        (
            RewardConfig(verifiers=[VerifierConfig("x", file="no.py", function="f")]),
            "reward.verifiers[0].file=no.py is no file: give the path of the Python file that has "
            "the function f",
        ),
        (
            RewardConfig(verifiers=[VerifierConfig("x", file=str(Path(__file__)), style="slime")]),
            "reward.verifiers[0].style=slime is not one of verl, trl, areal",
        ),
        (
            RewardConfig(verifiers=[VerifierConfig("x", "math", file="f.py")]),
            "reward.verifiers[0].file=f.py needs reward.verifiers[0].use=function",
        ),
    ],
)
def test_problems(config: RewardConfig, problem: str) -> None:
    assert reward_problems(config) == [problem]
