"""Supervised steps before RL, and what keeps them from being taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_m1.errors import ConfigError
from megatron_m1.rl.config import PromptsConfig, TaskConfig, TeachConfig
from megatron_m1.rl.teaching import taught
from parallel.layout import Layout
from tests.rl.stored import rl_config


def test_a_batch_that_cannot_be_divided(single_process: Layout, tmp_path: Path) -> None:
    prompts = PromptsConfig(tasks=[TaskConfig("brackets")], tokenizer="bytes")
    config = rl_config(str(tmp_path), data=prompts, teach=TeachConfig(steps=1, batch=5))
    with pytest.raises(ConfigError, match="teach, .*: train.global_batch=5 must be a multiple"):
        taught(config)
    assert not any(tmp_path.iterdir())
