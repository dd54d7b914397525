"""Which of the tokens that ask for an expert it takes, when it takes a limited number.

    capacity = ceil(A / E * factor)        A assignments of the group's tokens, E experts

One capacity counts for a whole group of ranks: before anything is sent, the ranks gather how many
tokens are pending for each expert, so that an expert which is busy with one rank's tokens and idle
with another's drops none (the global router of MiniMax-01, arXiv 2501.08313, section 2.1; it does
not say which tokens are dropped). The order in which an expert takes tokens is the policy:

    position  ranks in the order of the group, on each its tokens in their order. Gathers the
              pending counts, [E] numbers a rank.
    probs     the most probable of the whole group, equal ones in the order of ``position``. Gathers
              the probabilities too, 2 * topk numbers a token.

Both take the tokens that one process would take which saw all of them in the order of the ranks.

Shapes: N tokens of this rank, R ranks of the group, E experts, K experts asked by a token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.exchange import all_gather

POLICIES = ("probs", "position")


@torch.no_grad()
def taken(
    probs_NE: Tensor,
    pending_NE: Tensor,
    topk: int,
    factor: float,
    policy: str,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The assignments within capacity, [N, E] bool, a part of ``pending_NE``. Collective.

    Args:
        probs_NE: probability of each assignment.
        pending_NE: bool, at most ``topk`` in a row.
        factor: capacity in units of an expert's fair share of the assignments.
        policy: one of POLICIES.
        group: ranks that share the capacity, all with the same N; None is this one alone.
    """
    choose = {"position": _first, "probs": _most_probable}[policy]
    return choose(probs_NE, pending_NE, topk, factor, group)


def _capacity(assignments: Tensor, experts: int, factor: float) -> Tensor:
    return torch.ceil(assignments.double() / experts * factor)


def _first(
    probs_NE: Tensor, pending_NE: Tensor, topk: int, factor: float, group: dist.ProcessGroup | None
) -> Tensor:
    counts_RE = _gather(pending_NE.sum(dim=0), group)
    capacity = _capacity(counts_RE.sum(), pending_NE.shape[1], factor)
    earlier_E = counts_RE[: _rank(group)].sum(dim=0)
    return pending_NE & (earlier_E + pending_NE.cumsum(dim=0) <= capacity)


def _most_probable(
    probs_NE: Tensor, pending_NE: Tensor, topk: int, factor: float, group: dist.ProcessGroup | None
) -> Tensor:
    tokens, experts = probs_NE.shape
    # A token that asks for fewer than K experts fills up with ones that sort behind every other.
    probs_NK, experts_NK = probs_NE.float().masked_fill(~pending_NE, -1.0).topk(topk, dim=1)
    # One message; numbers of experts are exact in FP32.
    asked = _gather(torch.stack([probs_NK, experts_NK.float()]).flatten(1), group)
    probs, expert = asked.transpose(0, 1).flatten(1)
    capacity = _capacity((probs >= 0).sum(), experts, factor)

    order = probs.argsort(descending=True, stable=True)
    order = order[expert[order].argsort(stable=True)]
    expert = expert[order]
    starts = torch.searchsorted(expert, torch.arange(experts, device=expert.device).float())
    place = torch.arange(len(expert), device=expert.device) - starts[expert.long()]
    within = torch.empty_like(place, dtype=torch.bool)
    within[order] = place < capacity

    start = _rank(group) * tokens * topk
    within_NK = within[start : start + tokens * topk].view(tokens, topk)
    return torch.zeros_like(pending_NE).scatter(1, experts_NK, within_NK) & pending_NE


def _gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[...] of each rank -> [R, ...] in the order of the group."""
    if group is None or group.size() == 1:
        return local[None]
    return all_gather(group, local).wait()


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()
