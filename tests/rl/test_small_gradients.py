"""AdamW at MiniMax-M1's epsilon: gradients of 1e-14 move the weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_m1.config import OptimConfig
from megatron_m1.training.optimizer import set_clip, set_learning_rate
from megatron_m1.training.state import build_model
from parallel.layout import Layout
from tests.rl.stored import rl_config

GRADIENT = 1e-14
RATE = 1e-2


def moved(eps: float, distributed: bool) -> torch.Tensor:
    """How far each weight goes in one step along gradients of ``GRADIENT``."""
    optim = OptimConfig(lr=RATE, eps=eps, weight_decay=0.0, distributed=distributed)
    config = rl_config("unused", optim=optim)
    _, (chunk,), optimizer = build_model(config, config.train)
    chunk.zero_grad_buffer()  # type: ignore[operator]
    before = [parameter.detach().clone() for parameter in chunk.parameters()]
    for parameter in chunk.parameters():
        parameter.main_grad.fill_(GRADIENT)  # type: ignore[union-attr]
    set_learning_rate(optimizer, RATE)
    set_clip(optimizer, 1.0)
    _, norm, _ = optimizer.step()
    assert 0 < norm < 1e-9
    pairs = zip(before, chunk.parameters(), strict=True)
    return torch.cat([(old - new.detach()).flatten() for old, new in pairs])


@pytest.mark.parametrize("distributed", [True, False])
def test_gradients_of_1e_14_move_the_weights(single_process: Layout, distributed: bool) -> None:
    expected = torch.tensor(RATE * GRADIENT / (GRADIENT + 1e-15))
    found = moved(1e-15, distributed)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-3, atol=1e-7)


def test_they_do_not_at_the_usual_epsilon(single_process: Layout) -> None:
    assert moved(1e-8, True).abs().max() < 1e-7


def test_the_recipe_has_that_epsilon() -> None:
    from megatron_m1.config_loading import load
    from megatron_m1.rl.config import RLConfig

    assert load("train_rl", RLConfig, ["experiment=m1_recipe"]).optim.eps == 1e-15


def test_a_lower_bound_on_the_gradient_holds_from_the_next_step_on(single_process: Layout) -> None:
    config = rl_config("unused", optim=replace(rl_config("").optim, clip_grad=1e9))
    _, (chunk,), optimizer = build_model(config, config.train)
    set_clip(optimizer, 1e-3)
    for parameter in chunk.parameters():
        parameter.main_grad.fill_(1.0)  # type: ignore[union-attr]
    optimizer.step()
    total = sum(float(p.main_grad.square().sum()) for p in chunk.parameters())  # type: ignore
    assert total**0.5 == pytest.approx(1e-3, rel=1e-3)
