"""Every rule between the sections of a configuration."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_m1 import pretrain
from megatron_m1.config import GenerateConfig, LoadConfig, RunConfig, ScoreConfig
from megatron_m1.config_checks import (
    data_problems,
    generate_problems,
    model_layout_problems,
    run_problems,
    score_problems,
)
from megatron_m1.config_loading import load
from megatron_m1.errors import ConfigError
from megatron_m1.model.config import ModelConfig
from megatron_m1.pipeline_stages import stages
from parallel.layout import Layout


def problems(world_size: int, *overrides: str) -> list[str]:
    return run_problems(load("pretrain", RunConfig, overrides), world_size)


def test_the_default_run_has_no_problem() -> None:
    assert problems(1) == []


@pytest.mark.parametrize(
    ("world_size", "overrides", "problem"),
    [
        (3, "parallel.tp=2", "3 processes cannot be divided by parallel.tp*cp*pp = 2*1*1 = 2"),
        (2, "parallel.ep=4", "parallel.etp*ep*pp = 1*4*1 = 4: start a multiple of 4"),
        (4, "world_size=8", "world_size=8 does not equal the 4 started"),
        (1, "parallel.tp=0", "parallel.tp=0 is not a positive number"),
        (8, "parallel.tp=8", "model.num_attention_heads=4 is not divisible by parallel.tp=8"),
        (4, "parallel.tp=4", "model.num_query_groups=2 is not divisible by parallel.tp=4"),
        (2, "parallel.tp=2 model.vocab_size=4097", "model.vocab_size=4097 is not divisible by"),
        (3, "parallel.ep=3", "model.num_experts=8 is not divisible by parallel.ep=3"),
        (3, "parallel.etp=3", "model.ffn_hidden_size=128 is not divisible by parallel.etp=3"),
        (3, "parallel.pp=3", "model.num_layers=8 cannot be cut evenly over pp*vpp=3 stages"),
        (2, "parallel.vpp=2", "parallel.vpp=2 with parallel.pp=1: virtual stages need"),
        (2, "parallel.pp=2 parallel.vpp=3", "cannot be cut evenly over pp*vpp=6 stages"),
        (2, "parallel.pp=2 parallel.pipeline_layout=Ettt|ttttL", "has 7 layers (t), but model.num"),
        (2, "parallel.pp=2 parallel.pipeline_layout=Et*8L", "has 1 stages, but pp*vpp=2"),
        (2, "parallel.pp=2 parallel.pipeline_layout=E|t*8L", "leaves a pipeline rank without a"),
        (2, "parallel.pp=2 parallel.pipeline_layout=tttt|ttttL", "must be E (embedding), a t for"),
        (2, "parallel.pp=2 parallel.pipeline_layout=Ex|tL", "must be E (embedding), a t for each"),
        (1, "train.steps=null", "train.steps=None and train.tokens=None: set exactly one"),
        (1, "train.tokens=2B", "train.steps=200 and train.tokens=2000000000: set exactly one"),
        (1, "train.steps=0", "train.steps=0 must be at least 1"),
        (1, "train.micro_batch=0", "train.micro_batch=0 must be at least 1"),
        (1, "train.eval_every=-1", "train.eval_every=-1 must not be negative"),
        (
            2,
            "train.global_batch=12",
            "train.global_batch=12 must be a multiple of 8 (train.micro_batch 4 * data parallel 2)",
        ),
        (
            2,
            "parallel.pp=2 parallel.vpp=2 train.global_batch=12",
            "must be a multiple of 8 (train.micro_batch 4 * data parallel 1 * parallel.pp 2)",
        ),
        (
            1,
            "train.batch_phases=[{from_tokens:1k,global_batch:6}]",
            "train.batch_phases[0].global_batch=6 must be a multiple of 4",
        ),
        (1, "train.eval_every=1 train.eval_rows=2", "train.eval_rows=2 must be a multiple of 4"),
        (
            2,
            "parallel.tp=2 train.micro_batch=1 train.seq_length=33",
            "train.micro_batch * train.seq_length = 33 is not divisible by parallel.tp=2",
        ),
        (
            2,
            "parallel.tp=2 parallel.sequence_parallel=false train.micro_batch=1 "
            "train.seq_length=33",
            "train.micro_batch * train.seq_length = 33 is not divisible by parallel.tp=2",
        ),
        (
            8,
            "parallel.cp=8 parallel.ep=1 train.micro_batch=1 train.seq_length=6 "
            "train.global_batch=1",
            "= 6 tokens are too few to cut: parallel.cp=8 with cp_cut=balanced and tp=1 needs",
        ),
        (
            1,
            "optim.phases=[{tokens:9,lr:1,end_lr:0.1}]",
            "phases[0].end_lr=0.1 is not reached with",
        ),
        (1, "checkpoint.verify=off", "checkpoint.verify=off is not one of full, sizes"),
        (1, "checkpoint.on_error=ask", "checkpoint.on_error=ask is not one of stop, continue"),
        (1, "checkpoint.keep=0", "checkpoint.keep=0 must be at least 1, or null to keep all"),
        (1, "checkpoint.keep_every=-1", "checkpoint.keep_every=-1 must be at least 1, or null to"),
        (1, "model.capacity_factor=-1", "model.capacity_factor=-1.0 must be positive"),
        (1, "model.rope_theta=0", "model.rope_theta=0.0 must be positive"),
        (1, "model.aux_loss_coef=-1", "model.aux_loss_coef=-1.0 must not be negative"),
        (1, "model.init.std=-1", "model.init.std=-1.0 must not be negative"),
        (1, "model.z_loss_coef=-1", "model.z_loss_coef=-1.0 must not be negative"),
        (1, "model.drop_policy=best", "model.drop_policy=best is not one of probs, position"),
        (1, "model.capacity_scope=all", "model.capacity_scope=all is not one of rank, micro_b"),
        (1, "parallel.moe_overlap_groups=0", "parallel.moe_overlap_groups=0 must be at least 1"),
        (
            1,
            "parallel.moe_overlap_groups=4",
            "parallel.moe_overlap_groups=4 has no exchange to overlap with parallel.ep=1 and "
            "parallel.etp=1: use 1",
        ),
        (1, "parallel.moe_dispatcher=flex", "moe_dispatcher=flex is not one of alltoall, deepep"),
        (1, "parallel.moe_dispatcher=deepep", "needs ep * etp > 1, not parallel.ep=1 and"),
        (2, "parallel.moe_dispatcher=deepep parallel.ep=2", "needs train.precision=bf16, not fp32"),
        (
            2,
            "parallel.moe_dispatcher=deepep parallel.ep=2 parallel.moe_overlap_groups=2",
            "parallel.moe_overlap_groups=2 divides the all-to-all: with moe_dispatcher=deepep use",
        ),
        *(
            (8, f"parallel.overlap_moe_expert_parallel_comm=true {keys}", f"=true needs {what}")
            for keys, what in (
                ("", "parallel.ep > 1, not 1"),
                ("parallel.ep=2", "train.precision=bf16, not fp32"),
                ("parallel.ep=2 parallel.pp=2", "parallel.vpp >= 2 with parallel.pp=2"),
                ("parallel.ep=2 parallel.moe_overlap_groups=2", "parallel.moe_overlap_groups=1, n"),
                (
                    "parallel.ep=2 parallel.tp=2 parallel.sequence_parallel=false",
                    "sequence parallelism with parallel.tp=2",
                ),
                ("parallel.ep=2 train.recompute=full", "train.recompute=none, or selective with"),
            )
        ),
        (3, "parallel.ep=3", "model.num_experts=8 is not divisible by parallel.ep=3"),
        (3, "parallel.etp=3", "model.ffn_hidden_size=128 is not divisible by parallel.etp=3"),
        (1, "optim.betas=[0.9]", "optim.betas=[0.9] must be two numbers in [0, 1)"),
        (1, "optim.betas=[0.9,1]", "optim.betas=[0.9, 1.0] must be two numbers in [0, 1)"),
        (1, "optim.lr=0", "optim.lr=0.0 must be positive"),
        (1, "optim.eps=0", "optim.eps=0.0 must be positive"),
        (1, "optim.shape=cos", "optim.shape=cos is not one of constant, linear, cosine, expon"),
        (1, "optim.shape=exponential optim.min_lr=0", "optim.min_lr=0.0 must be positive where"),
        (1, "optim.phases=[{lr:1}]", "optim.phases[0].tokens=0 must be at least 1"),
        (1, "optim.phases=[{tokens:9}]", "optim.phases[0].lr=0.0 must be positive"),
        (1, "optim.phases=[{tokens:9,lr:1,shape:x}]", "optim.phases[0].shape=x is not one of"),
        (1, "optim.overlap_param_gather=true", "needs optim.distributed=true and optim.overlap_"),
        (1, "optim.distributed=false train.precision=bf16", "needs train.precision=fp32"),
        (1, "train.precision=fp8", "train.precision=fp8 is not one of fp32, bf16"),
        (1, "train.recompute=some", "train.recompute=some is not one of none, selective, full"),
        (1, "train.recompute_modules=[mlp]", "train.recompute_modules=mlp is not one of core_attn"),
        (1, "logger.wandb=maybe", "logger.wandb=maybe is not one of auto, offline, online"),
        (1, "data.corpus=web", "data.corpus=web is not one of stdlib, indexed"),
        (1, "model.layer_pattern=LX", "model.layer_pattern='LX' may hold only L"),
        (1, "model.router_topk=9", "model.router_topk=9 is more than model.num_experts=8"),
        (1, "model.init.method=foo", "model.init.method=foo is not one of xavier_normal"),
    ],
)
def test_rule(world_size: int, overrides: str, problem: str) -> None:
    found = problems(world_size, *overrides.split())
    assert any(problem in sentence for sentence in found), found


@pytest.mark.parametrize("overrides", [["data=indexed"], ["data=indexed", "data.weights=[1,2]"]])
def test_data_must_be_given_but_for_a_dry_run(overrides: list[str]) -> None:
    config = load("pretrain", RunConfig, overrides)
    assert "data.train=[PREFIX]" in data_problems(config)[0]
    with pytest.raises(ConfigError, match="data.train is empty"):
        pretrain.run(config)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_are_finite(value: str) -> None:
    with pytest.raises(ConfigError, match=f"optim.lr={value} is not a finite number"):
        load("pretrain", RunConfig, [f"optim.lr={value}"])


@pytest.mark.parametrize(
    ("asked", "missing"),
    [
        ("train.eval_every=5", "data.valid=[PREFIX]"),
        ("train.sample_prompt=a", "data.tokenizer=FILE"),
    ],
)
def test_what_is_asked_for_must_be_possible(asked: str, missing: str) -> None:
    config = load("pretrain", RunConfig, ["data=indexed", "data.train=[a]", asked])
    (problem,) = data_problems(config)
    assert missing in problem


def test_one_weight_for_each_dataset() -> None:
    config = load("pretrain", RunConfig, ["data=indexed", "data.train=[a]", "data.weights=[1,2]"])
    (problem,) = data_problems(config)
    assert problem.startswith("data.weights=[1.0, 2.0] must hold one number for each of the 1 data")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"precision": "fp8"}, "precision=fp8 is not one of fp32, bf16"),
        (
            {"checkpoint": LoadConfig(verify="none")},
            "checkpoint.verify=none is not one of full, sizes",
        ),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 (greedy) or more"),
        ({"top_p": 0.0}, "top_p=0.0 must be in (0, 1]"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"parallel": Layout(pp=2, vpp=2)}, "parallel.vpp=2: virtual stages serve training only"),
        ({"parallel": Layout(cp=2)}, "parallel.cp=2: context parallelism serves training only"),
    ],
)
def test_rules_of_generate(changes: dict[str, Any], problem: str) -> None:
    config = GenerateConfig(**changes)
    missing, *rest = sorted(generate_problems(config))
    assert missing.startswith("checkpoint.load is missing: give checkpoint.load=FOLDER")
    assert len(rest) == 1 and rest[0].startswith(problem)


def test_rules_of_score() -> None:
    assert sorted(score_problems(ScoreConfig(tokens="a.txt", micro_batch=0))) == [
        "checkpoint.load is missing: give checkpoint.load=FOLDER of a run",
        "micro_batch=0 must be at least 1",
        "out=null: give out=FILE.npy",
        "tokens=a.txt: give tokens=FILE.npy or tokens=FILE.jsonl",
    ]


@pytest.mark.parametrize("text", ["Ettt|tttttL", "E,t*3|(tt|)*2tL", "Et|(t|t)*2,|tL", "Et|tL"])
def test_stages_are_megatrons(text: str) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    letter = {"embedding": "E", "decoder": "t", "loss": "L"}
    theirs = [
        "".join(letter[layer.name] for layer in stage)
        for stage in PipelineParallelLayerLayout.parse_str_to_list(text)
    ]
    assert stages(Layout(pipeline_layout=text), num_layers=0) == theirs


def test_stages_without_a_layout_are_even() -> None:
    assert stages(Layout(), 3) == ["EtttL"]
    assert stages(Layout(pp=2, vpp=2), 8) == ["Ett", "tt", "tt", "ttL"]


def test_a_layout_that_fits_has_no_problem() -> None:
    layout = Layout(tp=2, pp=2, vpp=2, ep=2, pipeline_layout="Et|tt|tt|tttL")
    assert model_layout_problems(ModelConfig(), layout) == []
