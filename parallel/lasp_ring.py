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
from parallel.state_plan import Carry


def pass_states(
    carry: Carry, given_SHDD: Tensor, decay_H: Tensor, group: dist.ProcessGroup
) -> Callable[[], Entering]:
    """An exchange for `parallel.lasp.Lasp`: all of it runs where the result is asked for."""

    def entering() -> Entering:
        found: Entering = {}
        for way in carry.ways:
            for index, hop in enumerate(way):
                if hop.segment is None:
                    continue
                state_HDD = torch.zeros_like(given_SHDD[0])
                if index > 0:
                    arriving = swap(
                        group, (hop.rank, given_SHDD[:0]), (way[index - 1].rank, state_HDD)
                    )
                    found[hop.segment] = arriving.wait()
                if hop.slot is not None:
                    kept_H11 = torch.exp(decay_H.to(state_HDD.dtype) * -hop.tokens)[:, None, None]
                    leaving_HDD = torch.addcmul(given_SHDD[hop.slot], kept_H11, state_HDD)
                    after = way[index + 1].rank
                    swap(group, (after, leaving_HDD), (after, given_SHDD[:0])).wait()
        return found

    return entering
