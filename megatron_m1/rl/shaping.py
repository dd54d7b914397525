"""What DAPO (arXiv 2503.14476) does to rewards and groups, which MiniMax-M1 takes over."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_m1.rl.samples import Scored


def overlong_penalty(length: int, max_length: int, buffer: int, factor: float = 1.0) -> float:
    """What to add to the reward of a response of ``length`` tokens: 0 up to ``buffer`` tokens
    before the window's end, from there falling in a line to -``factor`` at it (DAPO's Eq. 13).

    Args:
        max_length: tokens of the window.
        buffer: tokens over which it falls; 0 for no penalty.

    Raises:
        ValueError: a buffer that is not in [0, max_length].
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(f"the overlong buffer is {buffer}; give 0 to {max_length}, the window")
    if not buffer:
        return 0.0
    beyond = length - (max_length - buffer)
    return -factor * min(max(beyond, 0) / buffer, 1.0)


def has_spread(group: Sequence[Scored]) -> bool:
    """Whether a group teaches anything, dynamic sampling's question: two of its responses have
    different rewards. Responses without a reward do not count."""
    rewards = {scored.reward for scored in group if not scored.failed}
    return len(rewards) > 1
