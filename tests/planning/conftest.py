"""What the planner's tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_m1.config_loading import load
from megatron_m1.model.config import ModelConfig
from megatron_m1.planning.config import PlanConfig


@pytest.fixture(scope="session")
def m1() -> ModelConfig:
    return load("plan", PlanConfig, ["model=m1_456b"]).model


@pytest.fixture
def plan_for() -> Callable[..., PlanConfig]:
    """``plan_for("key=value", ...)``: the planner's configuration, 456B on 512 H800 by default."""
    return lambda *overrides: load("plan", PlanConfig, overrides)
