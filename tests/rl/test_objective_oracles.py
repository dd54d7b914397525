"""Our objectives against those of TRL, verl and Liger, in loss and gradient, on a ragged batch.

TRL and Liger come with the extra ``oracles``; verl only with ``pip install --no-deps verl`` and
what it imports, since it pins versions of transformers that we do not run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.logprob import token_logprobs
from megatron_m1.rl.advantages import group_advantages
from megatron_m1.rl.aggregation import token_weights
from megatron_m1.rl.clip_ranges import from_cap, from_deltas
from megatron_m1.rl.mismatch import mismatch_metrics, mismatch_sums
from megatron_m1.rl.objectives import cispo_loss, dapo_loss, grpo_loss, summed_cispo

R, T = 6, 9
CAP = 2.0


class Batch:
    """Ratios on both sides of every bound, advantages of both signs, responses of 1 to T tokens."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.old = -3 * torch.rand(R, T, generator=random)
        self.logprobs = (self.old + torch.randn(R, T, generator=random)).requires_grad_()
        self.advantages = torch.tensor([1.5, -0.5, -1.0, 0.3, -0.8, 2.0])
        lengths = torch.tensor([T, 1, 5, 2, T - 1, 4])
        self.mask = (torch.arange(T) < lengths[:, None]).float()

    @property
    def ours(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.logprobs, self.old, self.advantages, self.mask


def agree(batch: Batch, ours: Tensor, theirs: Tensor) -> None:
    found, expected = (
        torch.autograd.grad(loss, batch.logprobs, retain_graph=True)[0] for loss in (ours, theirs)
    )
    assert abs(float(ours.detach()) - float(theirs.detach())) <= 1e-6
    assert expected.abs().max() > 1e-3
    assert (found - expected).abs().max() <= 1e-6


def trl_loss(batch: Batch, **settings: Any) -> tuple[Tensor, dict[str, Any]]:
    """TRL's loss and metrics, of a trainer that has only what the loss reads."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        current_gradient_accumulation_steps=1,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            batch.logprobs,
            torch.zeros(R, T),
            None,
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        use_vllm=False,
        **settings,
    )
    tokens = torch.zeros(R, T, dtype=torch.int64)
    inputs = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": batch.mask[:, :1],
        "completion_ids": tokens,
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "num_items_in_batch": batch.mask.sum(),
    }
    loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, trainer._metrics["train"]


def test_cispo_is_trls():
    batch, bounds = Batch(), from_cap(CAP)
    ours, _ = cispo_loss(*batch.ours, is_weight_max=bounds.max, aggregation="token_mean")
    theirs, _ = trl_loss(batch, loss_type="cispo", epsilon_high=CAP)
    agree(batch, ours, theirs)


@pytest.mark.parametrize(("kind", "ours"), [("grpo", grpo_loss), ("dapo", dapo_loss)])
def test_grpo_and_dapo_are_trls(kind: str, ours: Callable[..., tuple[Tensor, dict[str, float]]]):
    batch = Batch()
    high = {"grpo": 0.2, "dapo": 0.28}[kind]
    loss, metrics = ours(*batch.ours)
    theirs, their_metrics = trl_loss(batch, loss_type=kind, epsilon_low=0.2, epsilon_high=high)
    agree(batch, loss, theirs)
    for side in ("high", "low"):
        expected = their_metrics[f"clip_ratio/{side}_mean"][0]
        assert metrics[f"actor/pg_clipfrac_{side}"] == pytest.approx(expected) and expected > 0


def verl_loss(batch: Batch, mode: str, low: float, high: float, aggregation: str):
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=1e9,
    )
    return core.get_policy_loss_fn(mode)(
        batch.old,
        batch.logprobs,
        batch.advantages[:, None].expand(R, T),
        batch.mask,
        loss_agg_mode={"token_mean": "token-mean", "sequence_mean": "seq-mean-token-mean"}[
            aggregation
        ],
        config=config,
    )


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize(("low", "high"), [(1.0, CAP - 1), (10.0, 0.2), (0.2, 0.2)])
def test_cispo_is_verls(low: float, high: float, aggregation: str):
    batch, bounds = Batch(), from_deltas(low, high)
    theirs, their_metrics = verl_loss(batch, "cispo", low, high, aggregation)
    ours, metrics = cispo_loss(
        *batch.ours,
        is_weight_max=bounds.max,
        is_weight_min=bounds.min,
        aggregation=aggregation,
    )
    agree(batch, ours, theirs)
    for name in ("actor/pg_clipfrac", "actor/ppo_kl"):
        assert metrics[name] == pytest.approx(their_metrics[name], abs=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_ppo_is_verls(aggregation: str):
    batch = Batch()
    theirs, their_metrics = verl_loss(batch, "vanilla", 0.2, 0.28, aggregation)
    ours, metrics = dapo_loss(*batch.ours, aggregation=aggregation)
    agree(batch, ours, theirs)
    for name in ("actor/pg_clipfrac", "actor/ppo_kl"):
        assert metrics[name] == pytest.approx(their_metrics[name], abs=1e-6)


def test_advantages_are_verls():
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.25, 1.0, 1.0, 7.0, -3.0])
    prompts = torch.tensor([5, 5, 5, 5, 2, 2, 9, 9])
    mask = torch.ones(8, 1)
    theirs, _ = core.compute_grpo_outcome_advantage(rewards[:, None], mask, prompts.numpy())
    # verl adds 1e-6 to the standard deviation.
    assert torch.allclose(group_advantages(rewards, prompts), theirs[:, 0], rtol=1e-5)


def test_mismatch_is_verls():
    metrics = pytest.importorskip("verl.utils.debug.metrics")
    correction = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    batch = Batch()
    rollout, trainer = batch.old, (batch.old + 0.1 * (batch.logprobs - batch.old)).detach()
    ours = mismatch_metrics(mismatch_sums(rollout, trainer, batch.mask).metrics())

    p, q, live = rollout.exp(), trainer.exp(), batch.mask.bool()
    difference = metrics.calculate_log_prob_diff(q, p, live)
    kl = correction.compute_offpolicy_metrics(trainer, rollout, batch.mask)
    weight = correction.compute_is_metrics(
        q / p, q / p, trainer - rollout, batch.mask, "token", rollout_is_threshold=1e9
    )
    expected = {
        "training/rollout_probs_diff_mean": difference.mean(),
        "training/rollout_probs_diff_max": difference.max(),
        "training/rollout_probs_diff_std": difference.std(correction=0),
        "training/rollout_actor_probs_pearson_corr": metrics.pearson_correlation_coefficient(
            q, p, live
        ),
        "rollout_corr/kl": kl["kl"],
        "rollout_corr/k3_kl": kl["k3_kl"],
        **{
            f"rollout_corr/{name}": weight[name]
            for name in ("rollout_is_mean", "rollout_is_max", "rollout_is_eff_sample_size")
        },
    }
    assert ours == {name: pytest.approx(float(value), abs=1e-6) for name, value in expected.items()}


def test_head_and_cispo_together_are_ligers():
    """From hidden states: our log-probabilities and CISPO against Liger's fused head."""
    grpo = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    batch, random = Batch(), torch.Generator().manual_seed(1)
    hidden = torch.randn(R, T, 16, generator=random).requires_grad_()
    head = (torch.randn(50, 16, generator=random) / 4).requires_grad_()
    tokens = torch.randint(0, 50, (R, T), generator=random)
    old = torch.log_softmax(hidden.detach() @ head.detach().T, -1)
    old = old.gather(-1, tokens[..., None])[..., 0] + 0.7 * torch.randn(R, T, generator=random)

    logprobs, _ = token_logprobs(hidden.flatten(0, 1), head, tokens.flatten(), with_entropy=False)
    weights = token_weights(batch.mask, None, "token_mean").flatten()
    ours, _ = summed_cispo(
        logprobs,
        old.flatten(),
        batch.advantages.repeat_interleave(T),
        weights,
        is_weight_max=CAP,
    )
    found = torch.autograd.grad(ours, (hidden, head))

    liger = grpo.LigerFusedLinearGRPOLoss(
        beta=0, compiled=False, use_ref_model=False, loss_type="cispo", epsilon_high=CAP
    )
    theirs, _ = liger(hidden, head, tokens, batch.mask, batch.advantages, old_per_token_logps=old)
    expected = torch.autograd.grad(theirs, (hidden, head))
    assert abs(float(ours.detach()) - float(theirs.detach())) <= 1e-6
    for ours_grad, theirs_grad in zip(found, expected, strict=True):
        assert theirs_grad.abs().max() > 1e-3
        assert (ours_grad - theirs_grad).abs().max() <= 1e-6


def test_trls_default_cap_is_refused():
    grpo_config = pytest.importorskip("trl.trainer.grpo_config")
    fields = grpo_config.GRPOConfig.__dataclass_fields__
    with pytest.raises(ValueError, match=r"is 0.2, which cuts the weight 1 of on-policy tokens"):
        from_cap(fields["epsilon_high"].default or fields["epsilon"].default)
