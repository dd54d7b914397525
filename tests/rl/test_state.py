"""What responses on disk depend on: a run takes those alone that it would draw itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_m1.data.tokenizer import train_bpe
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.rollout.config import HttpConfig
from megatron_m1.rl.state import fingerprint
from parallel.layout import Layout
from tests.rl.drawing import Numbers
from tests.rl.stored import rl_config

SERVED = HttpConfig(urls=["http://127.0.0.1:8000"])
CONFIG = rl_config("runs/a")
REMOTE = replace(CONFIG, rollout=replace(CONFIG.rollout, engine="http", http=SERVED))
TOKENIZER = train_bpe([], 257)


def mark(config: RLConfig) -> str:
    return fingerprint(config, TOKENIZER, Numbers())


def with_section(name: str, **changes: Any) -> RLConfig:
    return replace(REMOTE, **{name: replace(getattr(REMOTE, name), **changes)})


@pytest.mark.parametrize(
    "same",
    [
        replace(REMOTE, run_dir="runs/b"),
        replace(REMOTE, parallel=Layout(tp=2)),
        with_section("train", steps=9),
        with_section("rollout", http=replace(SERVED, urls=["http://10.0.0.1:9"], timeout=5.0)),
    ],
)
def test_where_and_how_long_a_run_works_is_free(same: RLConfig) -> None:
    assert mark(same) == mark(REMOTE)


@pytest.mark.parametrize(
    "other",
    [
        CONFIG,
        replace(REMOTE, seed=REMOTE.seed + 1),
        with_section("rl", max_staleness=1),
        with_section("rollout", temperature=0.5),
        with_section("rollout", http=replace(SERVED, server="transformers")),
    ],
)
def test_what_draws_depend_on_is_not(other: RLConfig) -> None:
    assert mark(other) != mark(REMOTE)
