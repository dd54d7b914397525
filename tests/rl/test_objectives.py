from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_m1.rl.objectives import (
    cispo_loss,
    dapo_loss,
    grpo_loss,
    summed_cispo,
    summed_ppo,
)

LOG = math.log
CISPO = {"is_weight_max": 2.0}
OBJECTIVES = [(cispo_loss, CISPO), (grpo_loss, {}), (dapo_loss, {})]
every_objective = pytest.mark.parametrize(
    ("objective", "bounds"), OBJECTIVES, ids=["cispo", "grpo", "dapo"]
)


def hand_made() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ratios 1/2, 3 and 1 with A = 2, and 1/2, 3 and a masked 1 with A = -1."""
    old = torch.tensor([[-1.0, -2.0, -3.0], [-2.0, -2.0, -1.0]], dtype=torch.float64)
    ratios = torch.tensor([[0.5, 3.0, 1.0], [0.5, 3.0, 1.0]], dtype=torch.float64)
    advantages = torch.tensor([2.0, -1.0], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    return (old + ratios.log()).requires_grad_(), old, advantages, mask


def test_cispo_by_hand():
    logprobs, old, advantages, mask = hand_made()
    prompts = torch.tensor([0, 1])
    loss, metrics = cispo_loss(logprobs, old, advantages, mask, prompt_index=prompts, **CISPO)
    first = 0.5 * (-1 - LOG(2)) + 2 * (-2 + LOG(3)) + 1 * -3
    second = 0.5 * (-2 - LOG(2)) + 2 * (-2 + LOG(3))
    assert loss.item() == pytest.approx(-(2 * first / 3 - second / 2) / 2, abs=1e-12)
    loss.backward()
    expected = [[-0.5 / 3, -2 / 3, -1 / 3], [0.5 / 4, 2 / 4, 0]]
    assert logprobs.grad.tolist() == [pytest.approx(row, abs=1e-12) for row in expected]
    assert metrics["actor/pg_clipfrac"] == metrics["actor/pg_clipfrac_high"] == 2 / 5
    assert metrics["actor/pg_clipfrac_low"] == 0
    assert metrics["cispo/ratio_mean"] == pytest.approx(8 / 5)
    assert metrics["cispo/ratio_clamped_mean"] == pytest.approx(6 / 5)
    assert metrics["cispo/ratio_max"] == pytest.approx(3)
    assert metrics["cispo/ratio_min"] == pytest.approx(0.5)
    assert metrics["actor/ppo_kl"] == pytest.approx((2 * LOG(2) - 2 * LOG(3)) / 5)
    assert metrics["actor/ppo_kl_k3"] == pytest.approx((8 - 5 + 2 * LOG(2) - 2 * LOG(3)) / 5)
    assert "cispo/masked_frac" not in metrics


def test_cispo_with_a_lower_bound_counts_both_sides():
    logprobs, old, advantages, mask = hand_made()
    loss, metrics = cispo_loss(
        logprobs, old, advantages, mask, is_weight_max=2.0, is_weight_min=0.75
    )
    loss.backward()
    assert logprobs.grad[0].tolist() == pytest.approx([-0.75 * 2 / 5, -2 * 2 / 5, -2 / 5])
    assert metrics["actor/pg_clipfrac_high"] == metrics["actor/pg_clipfrac_low"] == 2 / 5
    assert metrics["actor/pg_clipfrac"] == 4 / 5


def test_the_mask_of_equation_7_has_bounds_of_its_own():
    logprobs, old, advantages, mask = hand_made()
    loss, metrics = cispo_loss(
        logprobs, old, advantages, mask, mask_max=2.5, mask_min=0.75, **CISPO
    )
    loss.backward()
    # Gone are r = 3 with A > 0 and r = 1/2 with A < 0; what stays is divided by 5 as before.
    expected = [[-0.5 * 2 / 5, 0, -2 / 5], [0, 2 / 5, 0]]
    assert logprobs.grad.tolist() == [pytest.approx(row) for row in expected]
    assert metrics["cispo/masked_frac"] == 2 / 5
    assert metrics["actor/pg_clipfrac"] == 2 / 5


def test_grpo_by_hand():
    logprobs, old, advantages, mask = hand_made()
    loss, metrics = grpo_loss(logprobs, old, advantages, mask)
    first, second = 2 * (0.5 + 1.2 + 1) / 3, -(0.8 + 3) / 2
    assert loss.item() == pytest.approx(-(first + second) / 2, abs=1e-12)
    loss.backward()
    expected = [[-0.5 * 2 / 6, 0, -2 / 6], [0, 3 / 4, 0]]
    assert logprobs.grad.tolist() == [pytest.approx(row, abs=1e-12) for row in expected]
    assert metrics["actor/pg_clipfrac_high"] == metrics["actor/pg_clipfrac_low"] == 1 / 5


def test_ppo_counts_what_it_stops_on_each_side():
    logprobs, old, advantages, mask = hand_made()
    for low, high, sides in ((0.1, 1.2, (1, 0)), (0.8, 4, (0, 1)), (0.1, 4, (0, 0))):
        _, metrics = grpo_loss(logprobs, old, advantages, mask, ratio_min=low, ratio_max=high)
        found = metrics["actor/pg_clipfrac_high"], metrics["actor/pg_clipfrac_low"]
        assert found == (sides[0] / 5, sides[1] / 5)


def test_dapo_is_grpo_with_more_room_above_and_a_mean_of_tokens():
    logprobs, old, advantages, mask = hand_made()
    loss, _ = dapo_loss(logprobs, old, advantages, mask)
    assert loss.item() == pytest.approx(-(2 * (0.5 + 1.28 + 1) - (0.8 + 3)) / 5, abs=1e-12)
    loss.backward()
    assert logprobs.grad[0].tolist() == pytest.approx([-0.5 * 2 / 5, 0, -2 / 5])


def test_ppo_gradient_is_that_of_its_value():
    logprobs, old, advantages, mask = hand_made()
    weights = mask / mask.sum()
    assert torch.autograd.gradcheck(
        lambda x: summed_ppo(x, old, advantages[:, None], weights, ratio_max=1.2, ratio_min=0.8)[0],
        (logprobs,),
    )


def test_cispo_gradient_is_that_of_its_value_where_the_weight_is_clipped():
    # Only there is the weight constant; elsewhere its stopped gradient is the difference.
    logprobs, old, advantages, mask = hand_made()
    weights = mask / mask.sum()

    def loss(x: Tensor, cap: float, floor: float) -> Tensor:
        columns = advantages[:, None]
        return summed_cispo(x, old, columns, weights, is_weight_max=cap, is_weight_min=floor)[0]

    assert torch.autograd.gradcheck(lambda x: loss(x, 2.0, 2.0), (logprobs,))
    assert not torch.autograd.gradcheck(
        lambda x: loss(x, 5.0, 0.0), (logprobs,), raise_exception=False
    )


@every_objective
def test_only_the_learning_policy_gets_a_gradient(objective, bounds):
    logprobs, old, advantages, mask = hand_made()
    old.requires_grad_()
    advantages.requires_grad_()
    objective(logprobs, old, advantages, mask, **bounds)[0].backward()
    assert old.grad is None and advantages.grad is None


@every_objective
def test_on_policy_all_are_the_plain_policy_gradient(objective, bounds):
    _, old, advantages, mask = hand_made()
    logprobs = old.clone().requires_grad_()
    objective(logprobs, old, advantages, mask, aggregation="token_mean", **bounds)[0].backward()
    expected = -advantages[:, None] * mask / mask.sum()
    assert torch.allclose(logprobs.grad, expected, atol=1e-15)


@every_objective
def test_a_batch_of_masked_tokens_only(objective, bounds):
    logprobs, old, advantages, mask = hand_made()
    loss, metrics = objective(logprobs, old, advantages, torch.zeros_like(mask), **bounds)
    loss.backward()
    assert loss.item() == 0 and metrics == {}
    assert logprobs.grad.tolist() == [[0, 0, 0], [0, 0, 0]]


@every_objective
@pytest.mark.parametrize("value", [float("nan"), -torch.inf, torch.inf])
@pytest.mark.parametrize("where", ["logprobs", "old", "both"])
def test_what_stands_at_masked_tokens_changes_nothing(objective, bounds, value, where):
    logprobs, old, advantages, mask = hand_made()
    clean, clean_metrics = objective(logprobs, old, advantages, mask, **bounds)
    clean.backward()

    dirty_logprobs, dirty_old = logprobs.detach().clone(), old.clone()
    if where != "old":
        dirty_logprobs[1, 2] = value
    if where != "logprobs":
        dirty_old[1, 2] = value
    dirty_logprobs.requires_grad_()
    loss, metrics = objective(dirty_logprobs, dirty_old, advantages, mask, **bounds)
    loss.backward()
    assert loss.item() == clean.item() and metrics == clean_metrics
    assert torch.equal(dirty_logprobs.grad, logprobs.grad)


@every_objective
def test_the_advantage_of_a_response_left_out_may_be_anything(objective, bounds):
    logprobs, old, advantages, mask = hand_made()
    mask[1], advantages[1] = 0, float("nan")
    loss, _ = objective(logprobs, old, advantages, mask, **bounds)
    loss.backward()
    assert loss.isfinite() and logprobs.grad[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_that_overflows_on_a_live_token(dtype):
    old = torch.tensor([[-800.0, -1.0]], dtype=dtype)
    logprobs = torch.tensor([[-0.5, -1.0]], dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 2)
    loss, metrics = cispo_loss(logprobs, old, torch.tensor([1.0]), mask, **CISPO)
    loss.backward()
    assert loss.item() == pytest.approx((2 * 0.5 + 1) / 2)
    assert logprobs.grad.tolist() == [[-1.0, -0.5]]
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_probability_of_zero_under_the_old_policy_has_the_largest_weight():
    logprobs = torch.tensor([[-0.5]], requires_grad=True)
    old = torch.tensor([[-torch.inf]])
    loss, metrics = cispo_loss(logprobs, old, torch.tensor([3.0]), torch.ones(1, 1), **CISPO)
    loss.backward()
    assert loss.item() == 3.0 and logprobs.grad.tolist() == [[-6.0]]
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("objective", [grpo_loss, dapo_loss])
def test_ppo_stays_finite_and_keeps_its_direction_when_a_ratio_overflows(objective):
    old = torch.full((2, 1), -800.0)
    logprobs = torch.full((2, 1), -0.5, requires_grad=True)
    loss, _ = objective(logprobs, old, torch.tensor([1.0, -1.0]), torch.ones(2, 1))
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()
    assert logprobs.grad[0] == 0 and logprobs.grad[1] > 1e8


def test_low_precision_inputs_are_computed_in_float32():
    logprobs, old, advantages, mask = (x.detach() for x in hand_made())
    half = logprobs.bfloat16().requires_grad_()
    loss, _ = cispo_loss(half, old.bfloat16(), advantages, mask, **CISPO)
    wide, _ = cispo_loss(half.detach().float(), old.bfloat16().float(), advantages, mask, **CISPO)
    assert loss.dtype == torch.float32 and loss.item() == wide.item()
    loss.backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("low", "high"), [(-0.1, 2), (3, 2), (0, 0), (0, float("nan"))])
def test_bounds_that_are_no_range(low, high):
    logprobs, old, advantages, mask = hand_made()
    with pytest.raises(ValueError, match="must be absolute bounds"):
        cispo_loss(logprobs, old, advantages, mask, is_weight_max=high, is_weight_min=low)
    with pytest.raises(ValueError, match="must be absolute bounds"):
        grpo_loss(logprobs, old, advantages, mask, ratio_max=high, ratio_min=low)


@every_objective
def test_shapes_that_do_not_fit(objective, bounds):
    logprobs, old, advantages, mask = hand_made()
    for arguments in (
        (logprobs, old[:, :2], advantages, mask),
        (logprobs, old, advantages, mask[:1]),
        (logprobs, old, advantages[:, None], mask),
        (logprobs[0], old[0], advantages, mask[0]),
    ):
        with pytest.raises(ValueError, match=r"must be \[R, T\] and advantages \[R\], got"):
            objective(*arguments, **bounds)
