"""The sequential peer of LASP+: states go from span to span, each rank waiting for the one before.

Source: LASP (arXiv 2404.02882), with the decay of MiniMax-01 and documents that end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.exchange import swap
from parallel.lasp import Entering
from parallel.state_plan import PrefixSums


def pass_states(
    sums: PrefixSums, sent_SHDD: Tensor, decay_H: Tensor, group: dist.ProcessGroup
) -> Callable[[], Entering]:
    """An exchange for `parallel.lasp.Lasp`: all of it runs where the result is asked for."""
    nothing = sent_SHDD[:0]

    def entering() -> Entering:
        found: Entering = {}
        for terms in sums.documents:
            for index, term in enumerate(terms):
                if term.segment is None:
                    continue
                state_HDD = torch.zeros_like(sent_SHDD[0])
                if index > 0:
                    before = terms[index - 1].rank
                    swap(group, (before, nothing), (before, state_HDD)).wait()
                    found[term.segment] = state_HDD[None]
                if term.slot is not None:
                    kept_H11 = torch.exp(decay_H.to(state_HDD.dtype) * -term.tokens)[:, None, None]
                    leaving_HDD = torch.addcmul(sent_SHDD[term.slot], kept_H11, state_HDD)
                    after = terms[index + 1].rank
                    swap(group, (after, leaving_HDD), (after, nothing)).wait()
        return found

    return entering
