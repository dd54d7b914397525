"""The best sandbox of this machine."""

from __future__ import annotations

import pytest

from megatron_m1.rl.sandbox.config import SandboxConfig
from megatron_m1.rl.sandbox.outcome import SandboxUnavailable
from megatron_m1.rl.sandbox.sandbox import Sandbox, open_sandbox


@pytest.fixture(scope="session")
def sandbox_config() -> SandboxConfig:
    """Of bubblewrap, or where it cannot start, of the fallback."""
    config = SandboxConfig()
    try:
        open_sandbox(config)
    except SandboxUnavailable:
        config = SandboxConfig(kind="rlimits")
    return config


@pytest.fixture(scope="session")
def sandbox(sandbox_config: SandboxConfig) -> Sandbox:
    return open_sandbox(sandbox_config)
