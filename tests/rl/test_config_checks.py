"""What a run of RL refuses, in one sentence that names the value and a way out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_m1.rl.config import LatePhase, RLConfig
from megatron_m1.rl.config_checks import rl_problems
from megatron_m1.rl.rollout.config import HttpConfig
from megatron_m1.rl.windows import WindowsConfig
from parallel.layout import Layout
from tests.rl.stored import rl_config

BEGINNING = rl_config("runs/a")
ELSEWHERE = HttpConfig(urls=["http://127.0.0.1:8000"])


def changed(rl: dict[str, Any] | None = None, rollout: dict[str, Any] | None = None) -> RLConfig:
    return replace(
        BEGINNING,
        rl=replace(BEGINNING.rl, **(rl or {})),
        rollout=replace(BEGINNING.rollout, **(rollout or {})),
    )


ASYNCHRONOUS = {"max_staleness": 2, "old_logprobs": "rollout"}
HTTP = {"engine": "http", "http": ELSEWHERE}
SILENT = {**HTTP, "http": replace(ELSEWHERE, server="transformers")}


def test_what_can_run_has_no_problem() -> None:
    assert rl_problems(BEGINNING, 1) == []
    assert rl_problems(changed(ASYNCHRONOUS, HTTP), 1) == []
    virtual_stages = replace(BEGINNING, parallel=Layout(pp=2, vpp=2))
    assert rl_problems(virtual_stages, 2) == []


@pytest.mark.parametrize(
    ("rl", "rollout", "says"),
    [
        ({"max_staleness": -1}, {}, ("rl.max_staleness=-1", "negative")),
        (ASYNCHRONOUS, {}, ("rl.max_staleness=2", "rollout.engine=native", "rollout.engine=http")),
        ({"max_staleness": 1}, HTTP, ("rl.max_staleness=1", "rl.old_logprobs=rollout")),
        (
            ASYNCHRONOUS,
            {**HTTP, "tokens_per_step": 8},
            ("rollout.tokens_per_step=8", "rl.max_staleness=2", "null"),
        ),
        (
            {"late": [LatePhase(), LatePhase(is_weight_max=0.5)]},
            {},
            ("rl.late[1].is_weight_max=0.5", "at least 1"),
        ),
        ({"late": [LatePhase(clip_grad=0.0)]}, {}, ("rl.late[0].clip_grad=0.0", "positive")),
        ({}, {"engine": "http"}, ("rollout.http.urls=[]", "http://HOST:PORT")),
        ({"routing_replay": True}, HTTP, ("rl.routing_replay=true", "rollout.engine=native")),
        (
            ASYNCHRONOUS,
            {**HTTP, "http": replace(ELSEWHERE, server="vllm", model="m")},
            ("rl.max_staleness=2", "rollout.http.server=vllm"),
        ),
        ({}, {**SILENT, "repetition_length": 9}, ("rollout.repetition_length=9", "use 0")),
        ({"windows": WindowsConfig([4, 8])}, SILENT, ("rl.windows.stages=[4, 8]", "use one")),
        (ASYNCHRONOUS, SILENT, ("rl.max_staleness=2", "use 0")),
        ({"overlong_buffer": 25}, {}, ("rl.overlong_buffer=25", "24")),
        (
            {"overlong_buffer": 9, "windows": WindowsConfig([8, 16])},
            {},
            ("rl.overlong_buffer=9", "8, the tokens of the shortest"),
        ),
        ({}, {"repetition_probability": 1.0}, ("rollout.repetition_probability=1.0", "between")),
        ({}, {"stop": ["x", ""]}, ("rollout.stop=['x', '']", "empty")),
    ],
)
def test_what_cannot_run_is_one_sentence(
    rl: dict[str, Any], rollout: dict[str, Any], says: tuple[str, ...]
) -> None:
    (problem,) = rl_problems(changed(rl, rollout), 1)
    assert all(part in problem for part in says)
