"""Routing replay in a step of RL: the experts of the rollout in the update of other weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_m1.data.tokenizer import train_bpe
from megatron_m1.model.build import unwrap
from megatron_m1.rl.groups import Group
from megatron_m1.rl.learning import learn
from megatron_m1.rl.rollout.engine import Request, SamplingParams
from megatron_m1.rl.rollout.native import NativeEngine
from megatron_m1.rl.samples import Prompt, Scored
from megatron_m1.rl.state import RLRun
from megatron_m1.rl.windows import Windows
from megatron_m1.training.state import build_model
from parallel.layout import Layout
from tests.distributed import Pool
from tests.rl.stored import MODEL, rl_config

LAYOUTS = {"tp2": (2, Layout(tp=2)), "ep2": (2, Layout(ep=2)), "pp2": (2, Layout(pp=2))}


def drawn_groups(engine: NativeEngine) -> list[Group]:
    """Four prompts with four responses each, whose rewards differ."""
    sampling = SamplingParams(max_new_tokens=10)
    groups = []
    for prompt in range(4):
        tokens = tuple(range(1 + prompt, 8))
        group = Group(Prompt(prompt, "drawn", "", None), tokens, 4)
        requests = [Request(prompt, index, tokens, 1, sampling) for index in range(4)]
        found = {response.index: response for response in engine.generate(requests)}
        for index in range(4):
            group.responses[index] = found[index]
            group.scored.append(Scored(found[index], float(index % 2)))
        groups.append(group)
    return groups


def step(layout: Layout, replay: bool) -> dict[str, Any]:
    """Roll out, turn the routers round, learn: what the rollout chose, what the updates used, what
    became of the routers."""
    config = rl_config("unused", layout)
    config = replace(config, model=replace(MODEL, vocab_size=258))
    layout.build_groups()
    transformer, chunks, optimizer = build_model(config, config.train)
    tokenizer = train_bpe([], 257, ["<eod>"])
    engine = NativeEngine(chunks, tokenizer, slots=4, record_experts=replay)
    groups = drawn_groups(engine)
    routers = [layer.mlp.router for chunk in chunks for layer in unwrap(chunk).decoder.layers]
    with torch.no_grad():
        for router in routers:
            router.weight.neg_()
    optimizer.reload_model_params()
    before = [router.weight.detach().clone() for router in routers]
    nobody: Any = None
    run = RLRun(
        config,
        transformer,
        chunks,
        optimizer,
        engine,
        nobody,
        Windows(config.rl.windows, 24),
        tokenizer=tokenizer,
        length_bias=nobody,
    )
    used = [count_experts(router) for router in routers]
    learned = learn(run, groups, 24)
    return {
        "rolled": histogram(groups) if replay else None,
        "used": torch.stack(used),
        "moved": [
            float((router.weight - old).norm()) for router, old in zip(routers, before, strict=True)
        ],
        "metrics": learned.metrics,
        "tokens": [scored.response.tokens for group in groups for scored in group.scored],
    }


def histogram(groups: list[Group]) -> Tensor:
    """[layers, experts] tokens that the rollout sent to each expert."""
    experts_TLK = torch.cat([scored.response.experts for g in groups for scored in g.scored]).long()
    return torch.stack([layer.flatten().bincount(minlength=4) for layer in experts_TLK.unbind(1)])


def count_experts(router: Any) -> Tensor:
    """[experts] tokens that updates will send to each, padding left out."""
    counts = torch.zeros(4, dtype=torch.int64)

    def count(module: Any, given: Any, output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            text = ~given[1].flatten() if given[1] is not None else slice(None)
            counts.add_(output[1][text].sum(0))

    router.register_forward_hook(count)
    return counts


@pytest.fixture(scope="module")
def replayed(ranks: Callable[[int], Pool]) -> dict[str, Any]:
    return ranks(1).run(step, Layout(), True)[0]


@pytest.fixture(scope="module")
def unreplayed(ranks: Callable[[int], Pool]) -> dict[str, Any]:
    return ranks(1).run(step, Layout(), False)[0]


def test_the_update_uses_the_rollouts_experts(replayed: dict[str, Any]) -> None:
    assert torch.equal(replayed["used"], replayed["rolled"])


def test_without_replay_the_routers_choose_again(
    replayed: dict[str, Any], unreplayed: dict[str, Any]
) -> None:
    assert unreplayed["tokens"] == replayed["tokens"]
    assert unreplayed["used"].sum() == replayed["used"].sum()
    assert all((unreplayed["used"] != replayed["rolled"]).any(dim=1))
    assert unreplayed["metrics"]["actor/pg_loss"] != pytest.approx(
        replayed["metrics"]["actor/pg_loss"], rel=1e-3
    )


def test_routers_learn_from_experts_that_were_given(replayed: dict[str, Any]) -> None:
    assert all(moved > 1e-3 for moved in replayed["moved"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_replays_the_step(
    name: str, ranks: Callable[[int], Pool], replayed: dict[str, Any]
) -> None:
    size, layout = LAYOUTS[name]
    for found in ranks(size).run(step, layout, True):
        assert found["tokens"] == replayed["tokens"]
        for metric, value in replayed["metrics"].items():
            assert found["metrics"][metric] == pytest.approx(value, rel=2e-3, abs=2e-6), metric
