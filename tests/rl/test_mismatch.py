from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch

from megatron_m1.rl.mismatch import mismatch_metrics, mismatch_sums
from megatron_m1.rl.token_sums import TokenSums

CORRELATION = "training/rollout_actor_probs_pearson_corr"


def compare(rollout: torch.Tensor, trainer: torch.Tensor) -> dict[str, float]:
    live = torch.ones_like(rollout)
    return mismatch_metrics(mismatch_sums(rollout, trainer, live).metrics())


def draws(tokens: int = 2000, noise: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    rollout = -torch.rand(tokens, generator=random, dtype=torch.float64) * 4
    noise_T = noise * torch.randn(tokens, generator=random, dtype=torch.float64)
    return rollout, (rollout + noise_T).clamp(max=0)


def test_against_the_definitions():
    rollout, trainer = draws()
    found = compare(rollout, trainer)
    p, q = rollout.exp().numpy(), trainer.exp().numpy()
    ratio = q / p
    expected = {
        CORRELATION: np.corrcoef(p, q)[0, 1],
        "training/rollout_probs_diff_mean": np.abs(p - q).mean(),
        "training/rollout_probs_diff_max": np.abs(p - q).max(),
        "training/rollout_probs_diff_std": np.abs(p - q).std(),
        "rollout_corr/kl": (rollout - trainer).mean(),
        "rollout_corr/k3_kl": (ratio - 1 - np.log(ratio)).mean(),
        "rollout_corr/rollout_is_mean": ratio.mean(),
        "rollout_corr/rollout_is_max": ratio.max(),
        "rollout_corr/rollout_is_eff_sample_size": ratio.sum() ** 2 / (ratio**2).sum() / len(p),
    }
    assert found == {name: pytest.approx(float(value)) for name, value in expected.items()}


def test_policies_that_agree():
    rollout, _ = draws()
    found = compare(rollout, rollout)
    assert found[CORRELATION] == pytest.approx(1, abs=1e-12) and found[CORRELATION] <= 1
    assert found["training/rollout_probs_diff_max"] == 0
    assert found["rollout_corr/k3_kl"] == 0
    assert found["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(1)


def exact_correlation(rollout: torch.Tensor, trainer: torch.Tensor) -> float:
    with mpmath.workdps(60):
        p = [mpmath.exp(mpmath.mpf(value)) for value in rollout.tolist()]
        q = [mpmath.exp(mpmath.mpf(value)) for value in trainer.tolist()]
        mean_p, mean_q = mpmath.fsum(p) / len(p), mpmath.fsum(q) / len(q)
        dp, dq = [x - mean_p for x in p], [x - mean_q for x in q]
        return float(mpmath.fdot(dp, dq) / mpmath.sqrt(mpmath.fdot(dp, dp) * mpmath.fdot(dq, dq)))


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0])
def test_a_confident_policy(scale):
    # Probabilities 1 - 1e-9: in float32 they would all be 1, and squares of them in float64 equal.
    rollout, trainer = (values * scale for values in draws(400, noise=0.5))
    assert compare(rollout, trainer)[CORRELATION] == pytest.approx(
        exact_correlation(rollout, trainer), abs=1e-9
    )


def test_a_policy_that_knows_nothing():
    rollout, trainer = (values * 1e-3 - math.log(200_064) for values in draws(400, noise=0.5))
    assert compare(rollout, trainer)[CORRELATION] == pytest.approx(
        exact_correlation(rollout, trainer), abs=1e-9
    )


def test_parts_merge_whatever_is_masked_between():
    rollout, trainer = draws()
    expected = compare(rollout, trainer)
    padded = [
        torch.cat([part, torch.full((3,), fill)])
        for values, fill in ((rollout, math.nan), (trainer, -math.inf))
        for part in values.split(300)
    ]
    half = len(padded) // 2
    live = [torch.tensor([1.0] * (len(part) - 3) + [0.0] * 3) for part in padded[:half]]
    parts = [mismatch_sums(*part) for part in zip(padded[:half], padded[half:], live, strict=True)]
    assert mismatch_metrics(TokenSums.merged(parts).metrics()) == pytest.approx(expected)


def test_a_zero_probability_stays_finite():
    rollout, trainer = draws(10)
    trainer[3], rollout[5] = -math.inf, -math.inf
    found = compare(rollout, trainer)
    assert all(math.isfinite(value) for value in found.values())
    assert found["rollout_corr/rollout_is_max"] == pytest.approx(math.exp(20))


@pytest.mark.parametrize("value", [0.0, -0.1, -12.3])
def test_equal_probabilities_have_no_correlation(value):
    same = torch.full((1000,), value)
    found = compare(same, draws(1000)[1])
    assert CORRELATION not in found and len(found) == 8


def test_no_token_has_no_mismatch():
    assert mismatch_metrics(mismatch_sums(*draws(5), torch.zeros(5)).metrics()) == {}
