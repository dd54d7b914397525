"""Every file under conf/ is one that a run can be made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_m1 import pretrain, train_rl
from megatron_m1.cluster.config import SubmitConfig
from megatron_m1.config import GenerateConfig, RunConfig, ScoreConfig, ServeConfig
from megatron_m1.config_checks import (
    generate_problems,
    run_problems,
    score_problems,
    serve_problems,
)
from megatron_m1.config_loading import CONF, load
from megatron_m1.planning.config import PlanConfig
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.config_checks import rl_problems

GROUP_FILES = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml"))
EXPERIMENTS = [path.stem for path in GROUP_FILES if path.parent.name == "experiment"]
OF_RL = {
    *(str(path) for path in GROUP_FILES if path.parent.name in ("rl", "rollout", "reward")),
    *("data/tasks.yaml", "data/files.yaml", "train/rl.yaml"),
    *("experiment/rl_tiny.yaml", "experiment/compare_rl.yaml", "experiment/m1_recipe.yaml"),
}
MODELS = [path.stem for path in GROUP_FILES if path.parent.name == "model"]


def described(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What ``dry_run=true`` prints."""
    pretrain.run(load("pretrain", RunConfig, ["dry_run=true", *overrides]))
    return capsys.readouterr().out


@pytest.mark.parametrize("path", GROUP_FILES, ids=str)
def test_every_option_of_every_group_makes_a_run(path: Path) -> None:
    # Eight-fold tensor parallelism needs more heads than the default model has.
    model = ["model=m1_456b"] if path.stem == "h800_m1" else []
    if path.parent.name == "cluster":
        assert load("submit", SubmitConfig, [f"cluster={path.stem}"]).problems() == []
        return
    if str(path) in OF_RL:
        rl = load("train_rl", RLConfig, [f"{path.parent}={path.stem}"])
        assert rl_problems(rl, rl.parallel.smallest_world) == []
        return
    of_planner = path.parent.name == "plan"
    program, schema = ("plan", PlanConfig) if of_planner else ("pretrain", RunConfig)
    config = load(program, schema, [f"{path.parent}={path.stem}", *model])
    assert run_problems(config, config.parallel.smallest_world) == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_dry_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if f"experiment/{name}.yaml" in OF_RL:
        train_rl.run(load("train_rl", RLConfig, ["dry_run=true", f"experiment={name}"]))
        text = capsys.readouterr().out
    else:
        text = described(capsys, f"experiment={name}")
    assert f"run_dir: runs/{name}" in text
    assert "GiB on the fullest process" in text


@pytest.mark.parametrize("name", MODELS)
def test_every_model_dry_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = described(capsys, f"model={name}")
    assert f"name: {name}" in text
    assert "processes = pp 1 x dp 1 x cp 1 x tp 1" in text


def test_the_largest_model_has_the_published_size(capsys: pytest.CaptureFixture[str]) -> None:
    text = described(capsys, "model=m1_456b", "parallel=h800_m1")
    assert "456,089,655,296 parameters; 45,944,920,064 active a token without" in text
    assert "70 lightning and 10 softmax layers" in text
    assert "64 processes = pp 8 x dp 1 x cp 1 x tp 8" in text
    assert "64 processes = pp 8 x edp 1 x ep 8 x etp 1" in text


def test_a_dry_run_describes_as_many_processes_as_it_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = described(capsys, "experiment=text01_456b", "world_size=512")
    assert "512 processes = pp 8 x dp 8 x cp 1 x tp 8" in text
    assert "133,784 steps, 11,400,000,000,000 tokens" in text


def test_programs_that_do_not_train_compose() -> None:
    generate = load("generate", GenerateConfig, ["checkpoint.load=runs/a"])
    assert generate_problems(generate) == []
    score = load("score", ScoreConfig, ["checkpoint.load=a", "tokens=a.jsonl", "out=b.npy"])
    assert score_problems(score) == []
    serve = load("serve", ServeConfig, ["checkpoint.load=runs/a", "server.port=0"])
    assert serve_problems(serve) == []
    wrong = load("serve", ServeConfig, ["server.slots=0", "server.port=65536", "parallel.cp=2"])
    assert [problem.split()[0] for problem in serve_problems(wrong)] == [
        *("checkpoint.load", "parallel.cp=2:", "server.slots=0", "server.port=65536")
    ]


def test_the_recipe_is_what_the_report_says(capsys: pytest.CaptureFixture[str]) -> None:
    config = load("train_rl", RLConfig, ["experiment=m1_recipe"])
    assert (config.optim.betas, config.optim.eps) == ([0.9, 0.95], 1e-15)
    assert config.rl.updates_per_batch == 16
    assert (config.rl.is_weight_min, config.rl.mask_max) == (0.0, None)
    assert config.rl.aggregation == "prompt_mean"
    assert config.rl.dynamic_sampling
    assert config.rl.windows.stages == [k * 1024 for k in (40, 48, 56, 64, 72, 80)]
    assert (config.rollout.repetition_length, config.rollout.repetition_probability) == (3000, 0.99)
    assert config.model.fp32_lm_head
    assert config.model.aux_loss_coef == 0
    lowered = [(phase.is_weight_max, phase.clip_grad) for phase in config.rl.late]
    assert lowered == sorted(lowered, reverse=True)


def test_rl_refuses_the_routers_losses_unless_asked() -> None:
    config = load("train_rl", RLConfig, ["model.aux_loss_coef=1e-3"])
    (problem,) = rl_problems(config, 1)
    assert "model.aux_loss_coef=0.001" in problem
    asked = load("train_rl", RLConfig, ["model.aux_loss_coef=1e-3", "rl.router_losses=true"])
    assert rl_problems(asked, 1) == []
