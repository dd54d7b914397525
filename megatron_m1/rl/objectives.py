"""Policy-gradient objectives: CISPO of MiniMax-M1 (arXiv 2506.13585), and GRPO and DAPO to compare
with. Losses are to be minimised; none has a KL term.

With r = exp(logprob - old logprob) of a token and A the advantage of its response:

    cispo   - sg(clip(r, is_weight_min, is_weight_max)) A logprob      Eq. 4 and 5
    ppo     - min(r A, clip(r, ratio_min, ratio_max) A)                GRPO, DAPO

sg stops the gradient, so that CISPO keeps a gradient at every token, clipped or not. All bounds are
absolute, those of r itself; `clip_ranges` converts from the ways in which others write them.

`summed_cispo` and `summed_ppo` take tokens in any shape with the weights that `aggregation` makes
of the whole batch, and return this part's share of the loss: what a trainer of packed rows adds up.
The others take a whole batch of R responses padded to T.

Values at tokens that are left out never enter the computation, be they NaN or infinite: neither a
loss nor a gradient that is 0 * NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_m1.rl.aggregation import token_weights
from megatron_m1.rl.token_sums import TokenSums

# A log-ratio is clamped to +- this before exp: 4.9e8 is above any bound, and its sums are finite.
MAX_LOG_RATIO = 20.0

Metrics = dict[str, float]


def summed_cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    is_weight_max: float,
    is_weight_min: float = 0.0,
    mask_max: float = math.inf,
    mask_min: float = 0.0,
) -> tuple[Tensor, TokenSums]:
    """Weighted sum of the tokens' CISPO losses, and what they add to metrics.

    Args:
        logprobs: under the policy that learns, the only argument that gets a gradient.
        old_logprobs: under the policy that the responses were drawn from.
        advantages: of each token's response.
        weights: of each token in the batch's loss; 0 leaves it out.
        is_weight_max, is_weight_min: bounds of the importance weight. The report has no lower one.
        mask_max, mask_min: the mask of Eq. 7, which drops tokens with A > 0 and r > mask_max, or
            A < 0 and r < mask_min. The report trains without it, as the defaults do.

    Raises:
        ValueError: bounds that are no range.
    """
    _check_range("is_weight", is_weight_min, is_weight_max)
    _check_range("mask", mask_min, mask_max)
    tokens = _Tokens(logprobs, old_logprobs, advantages, weights)
    clamped = tokens.ratio.clamp(is_weight_min, is_weight_max)
    masked = tokens.beyond(mask_min, mask_max)
    losses = -clamped * tokens.advantages * tokens.logprobs
    loss = (torch.where(masked, 0.0, tokens.weights) * losses).sum()
    counts = {"too_high": tokens.ratio > is_weight_max, "too_low": tokens.ratio < is_weight_min}
    has_mask = mask_min > 0 or mask_max < math.inf
    return loss, tokens.sums(clamped, **counts, masked=masked if has_mask else None)


def summed_ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    ratio_max: float,
    ratio_min: float,
) -> tuple[Tensor, TokenSums]:
    """Weighted sum of the tokens' PPO losses, and what they add to metrics.

    Args:
        ratio_max, ratio_min: beyond them a ratio earns no more and has no gradient.

    The other arguments and errors are those of `summed_cispo`.
    """
    _check_range("ratio", ratio_min, ratio_max)
    tokens = _Tokens(logprobs, old_logprobs, advantages, weights)
    clamped = tokens.ratio.clamp(ratio_min, ratio_max)
    # The ratio with its gradient: of a live token, so that a clamp for exp does not silence it.
    ratio = tokens.ratio * (tokens.logprobs - tokens.logprobs.detach()).exp()
    stopped = tokens.beyond(ratio_min, ratio_max)
    gains = torch.where(stopped, clamped, ratio) * tokens.advantages
    rising = tokens.advantages > 0
    sums = tokens.sums(clamped, too_high=stopped & rising, too_low=stopped & ~rising)
    return -(tokens.weights * gains).sum(), sums


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    is_weight_max: float,
    is_weight_min: float = 0.0,
    mask_max: float = math.inf,
    mask_min: float = 0.0,
    prompt_index: Tensor | None = None,
    aggregation: str = "prompt_mean",
) -> tuple[Tensor, Metrics]:
    """CISPO's loss of a whole batch, and its metrics.

    Args:
        logprobs, old_logprobs: `[R, T]`.
        advantages: `[R]`.
        mask: `[R, T]`, non-zero at the tokens to train on.
        prompt_index: `[R]` the prompt of each response, any integers; None is one prompt for all.
        aggregation: prompt_mean, token_mean or sequence_mean, see `aggregation`.

    The other arguments are those of `summed_cispo`.

    Raises:
        ValueError: bounds, shapes or an aggregation that do not fit.
    """
    _check_shapes(logprobs, old_logprobs, advantages, mask)
    weights = token_weights(mask, prompt_index, aggregation)
    loss, sums = summed_cispo(
        logprobs,
        old_logprobs,
        advantages[:, None],
        weights,
        is_weight_max=is_weight_max,
        is_weight_min=is_weight_min,
        mask_max=mask_max,
        mask_min=mask_min,
    )
    return loss, sums.metrics()


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio_max: float = 1.2,
    ratio_min: float = 0.8,
    prompt_index: Tensor | None = None,
    aggregation: str = "sequence_mean",
) -> tuple[Tensor, Metrics]:
    """GRPO's loss of a whole batch, and its metrics: PPO's clipped objective, every response weighs
    the same. The arguments and errors are those of `cispo_loss`."""
    _check_shapes(logprobs, old_logprobs, advantages, mask)
    weights = token_weights(mask, prompt_index, aggregation)
    loss, sums = summed_ppo(
        logprobs,
        old_logprobs,
        advantages[:, None],
        weights,
        ratio_max=ratio_max,
        ratio_min=ratio_min,
    )
    return loss, sums.metrics()


def dapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio_max: float = 1.28,
    ratio_min: float = 0.8,
    prompt_index: Tensor | None = None,
    aggregation: str = "token_mean",
) -> tuple[Tensor, Metrics]:
    """DAPO's loss (arXiv 2503.14476) of a whole batch, and its metrics: GRPO's with more room above
    (clip-higher), every token weighs the same. Its dynamic sampling and overlong shaping are in
    `shaping`. The arguments and errors are those of `cispo_loss`."""
    return grpo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        ratio_max=ratio_max,
        ratio_min=ratio_min,
        prompt_index=prompt_index,
        aggregation=aggregation,
    )


class _Tokens:
    """What every objective needs of the tokens, 0 at those that are left out, in FP32 at least.

    Attributes:
        ratio: probability over the old one, without a gradient.
    """

    def __init__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor
    ) -> None:
        dtype = torch.promote_types(logprobs.dtype, torch.float32)
        self.live = weights != 0
        # Before anything else: NaN * 0 is NaN, forward and backward, and a chosen 0 is not.
        self.logprobs, old, self.advantages, self.weights = (
            torch.where(self.live, values, 0).to(dtype)
            for values in (logprobs, old_logprobs.detach(), advantages.detach(), weights.detach())
        )
        log_ratio = self.logprobs.detach() - old
        self.log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        self.ratio = self.log_ratio.exp()

    def beyond(self, low: float, high: float) -> Tensor:
        """Where the ratio has gone further than a bound in the direction of the advantage."""
        gone_up = (self.advantages > 0) & (self.ratio > high)
        gone_down = (self.advantages < 0) & (self.ratio < low)
        return gone_up | gone_down

    def sums(
        self,
        clamped: Tensor,
        *,
        too_high: Tensor,
        too_low: Tensor,
        masked: Tensor | None = None,
    ) -> TokenSums:
        """What the tokens add to metrics, which have verl's names where they mean the same."""
        ratio = self.ratio
        sums = {
            "actor/pg_clipfrac": too_high | too_low,
            "actor/pg_clipfrac_high": too_high,
            "actor/pg_clipfrac_low": too_low,
            "actor/ppo_kl": -self.log_ratio,
            "actor/ppo_kl_k3": self.log_ratio.expm1() - self.log_ratio,
            "cispo/ratio_mean": ratio,
            "cispo/ratio_clamped_mean": clamped,
        }
        if masked is not None:
            sums["cispo/masked_frac"] = masked
        return TokenSums.of(
            self.live, sums, max={"cispo/ratio_max": ratio}, min={"cispo/ratio_min": ratio}
        )


def _check_range(name: str, low: float, high: float) -> None:
    if not 0 <= low <= high or high == 0:
        raise ValueError(
            f"{name}_min={low} and {name}_max={high} must be absolute bounds of a ratio of "
            "probabilities, 0 <= min <= max"
        )


def _check_shapes(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> None:
    shapes = [list(values.shape) for values in (logprobs, old_logprobs, mask, advantages)]
    if logprobs.dim() != 2 or shapes != [shapes[0]] * 3 + [shapes[0][:1]]:
        raise ValueError(
            "logprobs, old_logprobs and mask must be [R, T] and advantages [R], got "
            f"{', '.join(map(str, shapes))}"
        )
