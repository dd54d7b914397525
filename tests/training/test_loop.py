"""The loop with its metrics and callbacks, in one process."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.config import RunConfig
from megatron_m1.pretrain import pretrain
from megatron_m1.training.run import Run
from parallel.layout import Layout
from tests.training.small_run import MODEL, small_config, write_data


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def records(run: Run) -> list[dict[str, Any]]:
    lines = (run.dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def config_in(folder: Path, prefix: str, **train: Any) -> RunConfig:
    config = small_config(str(folder), prefix)
    return replace(
        config,
        data=replace(config.data, valid=[prefix]),
        train=replace(config.train, **train),
    )


def test_a_run_records_every_step(single_process: Layout, tmp_path: Path, prefix: str) -> None:
    run = pretrain(config_in(tmp_path, prefix, eval_every=2, eval_rows=4))
    steps = [record for record in records(run) if "train/loss" in record]
    assert [record["train/step"] for record in steps] == [1, 2, 3, 4, 5]
    last = steps[-1]
    assert last["train/tokens"] == 5 * 4 * 64
    assert last["train/samples"] == 20
    assert 0 < last["perf/tokens_per_s"] < math.inf
    assert last["optim/grad_norm"] > 0
    # A balanced router has loss 1 in Megatron's scale; no router can be below it by much.
    assert 0.9 < last["train/aux_loss"] < 3
    assert "perf/mfu" not in last
    assert len(last["moe/load"]) == MODEL.num_layers
    for row in last["moe/load"]:
        assert sum(row) == pytest.approx(1, abs=1e-3)
    assert last["moe/drop_frac"] == 0
    assert [step["train/step"] for step in steps if "val/loss" in step] == [2, 4, 5]
    assert last["val/loss"] < steps[1]["val/loss"]


def test_evaluation_leaves_training_as_it_was(
    single_process: Layout, tmp_path: Path, prefix: str
) -> None:
    plain = pretrain(config_in(tmp_path / "plain", prefix))
    watched = pretrain(config_in(tmp_path / "watched", prefix, eval_every=1, eval_rows=4))
    losses = [
        [record["train/loss"] for record in records(run) if "train/loss" in record]
        for run in (plain, watched)
    ]
    assert losses[0] == losses[1]


def test_plain_concatenation_trains_too(
    single_process: Layout, tmp_path: Path, prefix: str
) -> None:
    config = config_in(tmp_path, prefix)
    run = pretrain(replace(config, data=replace(config.data, pack_documents=False)))
    losses = [record["train/loss"] for record in records(run) if "train/loss" in record]
    assert losses[-1] < losses[0]


def test_a_run_by_tokens_ends_at_them(single_process: Layout, tmp_path: Path, prefix: str) -> None:
    run = pretrain(config_in(tmp_path, prefix, steps=None, tokens=3 * 4 * 64))
    assert run.progress.step == 3
