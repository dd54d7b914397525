"""The search: what it finds can run and fits, what it refuses, and how it cuts pipelines."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_m1.config import RunConfig
from megatron_m1.config_checks import run_problems
from megatron_m1.config_loading import load
from megatron_m1.errors import ConfigError
from megatron_m1.planning import memory
from megatron_m1.planning.config import PlanConfig
from megatron_m1.planning.layouts import search
from megatron_m1.planning.memory import GIB
from megatron_m1.planning.stages import cut_with_head, pipeline_ranks
from parallel.layout import Layout
from tests.planning.test_cost import BF16_HEAD

Make = Callable[..., PlanConfig]


def test_what_is_found_runs_fits_and_is_sorted(plan_for: Make) -> None:
    config = plan_for("plan.search.tp=[4,8]", "plan.search.pp=[4,8]", "plan.search.ep=[8,32]")
    found = search(config)
    assert 10 < len(found.found) < found.judged
    assert found.tightest <= min(each.memory.total for each in found.found)
    speeds = [each.cost.tokens_per_second for each in found.found]
    assert speeds == sorted(speeds, reverse=True)
    for each in found.found:
        assert run_problems(each.config, 512) == []
        assert each.memory.total <= 70 * GIB
        assert each.memory == memory.estimate(each.config, 512)


def test_overrides_are_the_run(plan_for: Make) -> None:
    found = search(plan_for("plan.search.pp=[4]", "plan.search.recompute=[moe,full]")).found
    cut = next(each for each in found if each.config.parallel.pipeline_layout)
    for each in (found[0], cut):
        run = load("pretrain", RunConfig, ["experiment=text01_456b", *each.overrides()])
        assert (run.parallel, run_problems(run, 512)) == (each.config.parallel, [])
        assert run.train == each.config.train


def test_the_whole_model_needs_many_gpus(plan_for: Make) -> None:
    few = search(plan_for("plan.nodes=8"))
    assert few.found == [] and few.tightest > 70 * GIB
    assert search(plan_for("plan.nodes=64", "plan.search.pp=[8]", "plan.search.tp=[8]")).found


def test_a_configured_layout_is_judged_alone(plan_for: Make) -> None:
    config = plan_for("plan.search.enabled=false", "parallel=h800_m1", "plan.nodes=8")
    found = search(config)
    assert found.found == [] and found.configured and found.configured.config == config
    assert found.configured.memory.total == found.tightest > 70 * GIB
    larger = search(plan_for("plan.search.enabled=false", "parallel=h800_m1", "plan.nodes=64"))
    assert larger.found == [larger.configured]


def test_a_configured_layout_is_judged_beside_the_search(plan_for: Make) -> None:
    few = ["plan.search.tp=[4]", "plan.search.pp=[8]", "plan.search.ep=[32]"]
    found = search(plan_for("parallel=h800_m1", *few))
    assert found.configured and found.configured.config.parallel == Layout(tp=8, pp=8, ep=8)
    assert {each.config.parallel.tp for each in found.found} == {4}
    assert found.configured.cost.total > found.found[0].cost.total
    assert search(plan_for(*few)).configured is None


def test_the_configured_layout_is_listed_once(plan_for: Make) -> None:
    few = ["parallel=h800_m1", "plan.search.pp=[8]", "plan.search.ep=[8]"]
    beside = search(plan_for(*few, "plan.search.tp=[4]"))
    assert beside.to_list() == [*beside.found, beside.configured]
    same = ["plan.search.tp=[8]", "plan.search.micro_batch=[1]", "plan.search.recompute=[full]"]
    among = search(plan_for(*few, *same, "train.recompute=full", "train.micro_batch=1"))
    assert among.to_list() == among.found
    assert [among.is_configured(one) for one in among.found].count(True) == 1
    assert not any(map(search(plan_for(*few[1:])).is_configured, among.found))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["plan.nodes=0"], "plan.nodes=0 must be positive"),
        (["plan.hbm_tb_per_s=-1"], "plan.hbm_tb_per_s=-1.0 must be positive"),
        (["plan.efficiency.matmul=1.5"], r"plan.efficiency.matmul=1.5 must be in \(0, 1\]"),
        (["plan.reserved_gb=90"], "plan.reserved_gb=90.0 must be less than plan.gpu_memory_gb"),
        (["plan.search.tp=[]"], r"plan.search.tp=\[\] tries nothing"),
        (["plan.search.ep=[0]"], "plan.search.ep=0 must be at least 1"),
        (["plan.search.recompute=[some]"], "plan.search.recompute=some is not one of none, core"),
        (["plan.search.tp=[7]"], "plan.search divides 512 GPUs in no way"),
        (
            ["train.global_batch=7"],
            "in no way: for example, train.global_batch=7 must be a multiple of",
        ),
        (["model.num_attention_heads=7"], "=7 is not divisible by model.num_query_groups=8"),
        (["train.global_batch=0"], "train.global_batch=0 must be"),
        (
            ["plan.search.enabled=false", "parallel.tp=3"],
            "model.num_attention_heads=64 is not divisible by parallel.tp=3",
        ),
        (
            ["plan.search.enabled=false", "parallel.ep=64"],
            "model.num_experts=32 is not divisible by parallel.ep=64",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(
    plan_for: Make, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        search(plan_for(*overrides))


@pytest.mark.parametrize(
    ("pp", "vpp", "head", "text"),
    [
        (8, 1, 0.0, None),
        (1, 1, 5.0, None),
        (8, 1, 2.0, "Et*10|(t*10|)*4(t*11|)*2t*8L"),
        (4, 1, 30.0, "Et*26|(t*26|)*1(t*27|)*1t*1L"),
        (8, 2, 2.4, "Et*5|(t*5|)*12(t*6|)*2t*3L"),
    ],
)
def test_cut_with_head(plan_for: Make, pp: int, vpp: int, head: float, text: str | None) -> None:
    assert cut_with_head(80, pp, vpp, head) == text
    if text:
        layout = Layout(pp=pp, vpp=vpp if vpp > 1 else None, pipeline_layout=text)
        config = plan_for(BF16_HEAD)
        config.parallel = layout
        assert run_problems(config, pp) == []
        ranks = pipeline_ranks(config.model, layout)
        assert sum(len(rank.kinds) for rank in ranks) == 80
        assert "".join(rank.kinds for rank in ranks).count("S") == 10
        assert [rank.has_head for rank in ranks] == [False] * (pp - 1) + [True]
