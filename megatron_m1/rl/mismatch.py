"""How far the rollout policy and the trainer agree on the tokens that were drawn.

Both give a log-probability to each token of a response; with the same weights they differ by
arithmetic alone. MiniMax-M1 (arXiv 2506.13585, section 3.2) found the Pearson correlation of the
probabilities at 0.987 with a BF16 head and at 0.997 with an FP32 one.

`mismatch_sums` of parts of a batch merge, over micro-batches and ranks; from the whole
`mismatch_metrics` makes numbers, with verl's names where they mean the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from megatron_m1.rl.objectives import MAX_LOG_RATIO
from megatron_m1.rl.token_sums import TokenSums

# Variance over mean square below which numbers are equal but for rounding.
_EQUAL = 1e-14


def mismatch_sums(rollout_logprobs: Tensor, trainer_logprobs: Tensor, live: Tensor) -> TokenSums:
    """What the tokens that ``live`` is not 0 for add to the comparison, in any one shape.

    Args:
        rollout_logprobs: the model's own at temperature 1, as the rollout policy computed them.
        trainer_logprobs: the same as the trainer computes them.
    """
    rollout, trainer = rollout_logprobs.detach().double(), trainer_logprobs.detach().double()
    difference = (rollout.exp() - trainer.exp()).abs()
    log_ratio = (trainer - rollout).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    sums = {
        "difference": difference,
        "difference_squared": difference.square(),
        "ratio": ratio,
        "ratio_squared": ratio.square(),
        "k1": -log_ratio,
        "k3": log_ratio.expm1() - log_ratio,
        **_products("of 0", rollout.exp(), trainer.exp()),
        **_products("of 1", rollout.expm1(), trainer.expm1()),
    }
    return TokenSums.of(live != 0, sums, max={"difference_max": difference, "ratio_max": ratio})


def mismatch_metrics(means: Mapping[str, float]) -> dict[str, float]:
    """The comparison in numbers, from the means and extremes of `mismatch_sums`; nothing from none.

    The importance weights (trainer's probability over the rollout's) are not truncated, and the
    effective sample size is a share of the tokens. The correlation is left out where a side gives
    all tokens the same probability.
    """
    if not means:
        return {}
    variance = means["difference_squared"] - means["difference"] ** 2
    found = {
        "training/rollout_probs_diff_mean": means["difference"],
        "training/rollout_probs_diff_max": means["difference_max"],
        "training/rollout_probs_diff_std": math.sqrt(max(variance, 0.0)),
        "rollout_corr/kl": means["k1"],
        "rollout_corr/k3_kl": means["k3"],
        "rollout_corr/rollout_is_mean": means["ratio"],
        "rollout_corr/rollout_is_max": means["ratio_max"],
        "rollout_corr/rollout_is_eff_sample_size": means["ratio"] ** 2 / means["ratio_squared"],
    }
    correlation = _pearson(means)
    if correlation is not None:
        found["training/rollout_actor_probs_pearson_corr"] = correlation
    return found


def _products(origin: str, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What the correlation of probabilities, seen from an origin, is made of. Squares keep the
    digits in which probabilities near that origin differ: those of a policy that is sure of every
    token are all near 1, those of one that knows nothing near 0."""
    values = {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    return {f"{name} {origin}": value for name, value in values.items()}


def _pearson(means: Mapping[str, float]) -> float | None:
    """From the origin that has kept more digits."""
    found = [_pearson_from(origin, means) for origin in ("of 0", "of 1")]
    kept, correlation = max(found)
    return correlation if kept > _EQUAL else None


def _pearson_from(origin: str, means: Mapping[str, float]) -> tuple[float, float]:
    """The smaller of both variances as a share of its mean square, and the correlation."""
    x, y, xx, yy, xy = (means[f"{name} {origin}"] for name in ("x", "y", "xx", "yy", "xy"))
    variance_x, variance_y = xx - x * x, yy - y * y
    if variance_x <= 0 or variance_y <= 0:
        return 0.0, 0.0
    correlation = (xy - x * y) / math.sqrt(variance_x * variance_y)
    return min(variance_x / xx, variance_y / yy), max(-1.0, min(correlation, 1.0))
