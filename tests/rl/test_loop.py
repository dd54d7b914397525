"""Whole runs of several processes: what they draw and learn does not depend on the layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.config import CheckpointConfig
from megatron_m1.rl.config import PolicyConfig, PromptsConfig, RLConfig, RolloutConfig, TaskConfig
from megatron_m1.rl.rewards.config import RewardConfig, VerifierConfig
from megatron_m1.train_rl import train
from parallel.layout import Layout
from tests.distributed import Pool
from tests.rl.stored import MODEL, rl_config

LAYOUTS = {
    "pp2": (2, Layout(pp=2)),
    "pp2_interleaved": (2, Layout(pp=2, vpp=2)),
    "dp2": (2, Layout()),
}
VERIFIER = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(len(solution_str) % 3)
"""


def config_of(folder: Path, layout: Layout | None = None, **sections: Any) -> RLConfig:
    """A run of a model that nobody taught, rewarded for lengths."""
    verifier = folder / "verifier.py"
    verifier.write_text(VERIFIER)
    return rl_config(
        str(folder / "run"),
        layout,
        **{
            "model": replace(MODEL, vocab_size=320),
            "data": PromptsConfig(tasks=[TaskConfig("brackets")], tokenizer="bytes"),
            "reward": RewardConfig(verifiers=[VerifierConfig("brackets", file=str(verifier))]),
            "rl": PolicyConfig(group_size=4, prompts_per_batch=2, updates_per_batch=2),
            "rollout": RolloutConfig(max_new_tokens=8, slots=3),
            "checkpoint": CheckpointConfig(save_at_end=False),
            **sections,
        },
    )


def trained(config: RLConfig) -> list[dict[str, Any]]:
    """The records of a run."""
    config.parallel.build_groups()
    run = train(config)
    lines = (run.dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "train/step" in record]


@pytest.fixture(scope="module")
def one_process(
    ranks: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return ranks(1).run(trained, config_of(tmp_path_factory.mktemp("one")))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_takes_the_same_steps(
    name: str,
    ranks: Callable[[int], Pool],
    tmp_path: Path,
    one_process: list[dict[str, Any]],
) -> None:
    size, layout = LAYOUTS[name]
    (found, *_) = ranks(size).run(trained, config_of(tmp_path, layout))
    assert len(found) == 3
    for one, other in zip(found, one_process, strict=True):
        assert other["actor/grad_norm"] > 0
        for key in ("train/tokens", "train/prompts", "critic/rewards/mean"):
            assert one[key] == other[key]
        for key in ("actor/grad_norm", "actor/pg_loss", "actor/entropy", "rollout/perplexity"):
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
        assert one["training/rollout_probs_diff_max"] < 1e-5
