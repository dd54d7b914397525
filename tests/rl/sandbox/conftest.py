"""Sandboxes of each kind; bubblewrap's tests skip where it cannot start."""

from __future__ import annotations

import pytest

from megatron_m1.rl.sandbox.config import SandboxConfig
from megatron_m1.rl.sandbox.outcome import SandboxUnavailable
from megatron_m1.rl.sandbox.sandbox import Sandbox, open_sandbox


def opened(kind: str) -> Sandbox:
    try:
        return open_sandbox(SandboxConfig(kind=kind))
    except SandboxUnavailable as error:
        if kind == "rlimits":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def bubblewrap() -> Sandbox:
    return opened("bubblewrap")


@pytest.fixture(scope="session", params=["bubblewrap", "rlimits"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return opened(request.param)
