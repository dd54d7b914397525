"""Routing replay: a row's tokens go to experts that were chosen before.

Trainer and rollout compute the same router in other batches and other precision, so that now and
then a token would be trained on experts that did not draw it. A rollout that records the experts
lets the update use the same ones; their probabilities are those of the router's current logits, so
that it goes on learning.

Shapes: T tokens of the row, N of them on this rank, L layers of the whole model, E experts, K
experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EXPERTS = "experts"
"""What ``Routing.given`` is called among the extra tensors of a ``PackedRow``."""


@dataclass(frozen=True)
class Routing:
    """Routing replay: experts that tokens are sent to whatever the router would choose, and those
    that it did send them to. Probabilities are always those of the router's own logits.

    Attributes:
        given: [T, L, K], one more than the number of each expert; 0 leaves a token to the router,
            and None all of them.
        chosen: [T, L, K], written to: the number of each expert. None records nothing.
    """

    given: Tensor | None = None
    chosen: Tensor | None = None

    def part(self, rank: int, size: int) -> Routing:
        """Of the tokens that one of ``size`` tensor-parallel ranks routes."""
        if size == 1:
            return self
        return Routing(
            *(x if x is None else x.chunk(size)[rank] for x in (self.given, self.chosen))
        )

    def of_layer(self, number: int) -> LayerRouting:
        """For the layer of this number, from 0 in the whole model."""
        return LayerRouting(*(x if x is None else x[:, number] for x in (self.given, self.chosen)))


@dataclass(frozen=True)
class LayerRouting:
    """``Routing`` of one layer, as the choice that Megatron asks a ``router_replay`` for."""

    given: Tensor | None
    chosen: Tensor | None

    def get_replay_topk(
        self,
        scores_NE: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        choose: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the experts, both [N, K]."""
        scores_NK, experts_NK = choose(scores_NE, topk, num_groups, group_topk)
        if self.given is not None:
            given_NK = self.given.to(experts_NK.dtype)
            experts_NK = torch.where(given_NK > 0, given_NK - 1, experts_NK)
            scores_NK = scores_NE.gather(1, experts_NK)
        if self.chosen is not None:
            self.chosen.copy_(experts_NK)
        return scores_NK, experts_NK
