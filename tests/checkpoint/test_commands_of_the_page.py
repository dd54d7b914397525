"""The commands for training on docs/checkpoints.md, with the smallest of models and few steps."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from megatron_m1.config import RunConfig
from megatron_m1.config_loading import load
from megatron_m1.pretrain import pretrain
from parallel.layout import Layout
from tests.checkpoint.spoil import names

PAGE = Path(__file__).resolve().parents[2] / "docs/checkpoints.md"
MODEL = (
    *("model.num_layers=1", "model.layer_pattern=L", "model.hidden_size=16", "model.head_dim=16"),
    *("model.num_attention_heads=1", "model.num_query_groups=1", "model.rotary_dim=8"),
    *("model.ffn_hidden_size=16", "model.num_experts=2", "model.vocab_size=64"),
)
RUN = (
    *("data=indexed", "train.global_batch=1", "train.micro_batch=1", "train.seq_length=16"),
    *("train.eval_every=0", "train.sample_prompt=null", "train.report=false"),
    *("logger.console=false", "logger.wandb=disabled"),
)


def test_they_do_what_the_page_says(
    single_process: Layout,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = re.findall(
        r"^\.venv/bin/python -m megatron_m1\.pretrain (.*)$",
        PAGE.read_text().replace("\\\n", " "),
        re.M,
    )
    monkeypatch.chdir(tmp_path)

    def run(words: str, *more: str) -> str:
        given = [*shlex.split(words), *MODEL, *RUN, f"data.train=[{prefix}]", *more]
        finished = pretrain(load("pretrain", RunConfig, given))
        return f"{finished.dir} {finished.progress.step}"

    keeping, going_on, branching = commands
    assert run(keeping, "run_dir=runs/kept", "train.steps=1") == "runs/kept 1"
    assert run("experiment=tiny parallel.ep=1", "train.steps=2") == "runs/tiny 2"
    checkpoints = tmp_path / "runs/tiny/checkpoints"
    assert run(going_on, "train.steps=3") == "runs/tiny 3"
    assert names(checkpoints) == {"step_000002", "step_000003", "latest"}
    shutil.copytree(checkpoints / "step_000002", checkpoints / "step_000080")
    assert run(branching, "train.steps=4") == "runs/branch 4"
    assert capsys.readouterr().out.count("going on from step 2") == 2
