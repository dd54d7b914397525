"""What modules read and write while the model runs, and what they are made to read instead.

Shapes: N tokens of all sequences, n of them in the row that runs, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_m1.model.build import unwrap
from megatron_m1.model.lightning_attention import LightningAttention
from megatron_m1.model.router import Float32Router
from megatron_m1.model.routing import Routing

KINDS = ("embedding", "norm", "lightning", "softmax", "router", "experts", "head")
"""Of modules, in the order in which a token first meets them."""


@dataclass(frozen=True)
class Site:
    """A module at its place.

    Attributes:
        layer: 0-based number in the model; None outside of the layers.
    """

    kind: str
    layer: int | None
    module: nn.Module


def sites_of(chunk: nn.Module) -> list[Site]:
    """The modules of the whole model, in the order in which a token meets them."""
    model = unwrap(chunk)
    sites = [Site("embedding", None, model.embedding)]
    for number, layer in enumerate(model.decoder.layers):
        is_lightning = isinstance(layer.self_attention, LightningAttention)
        attention = "lightning" if is_lightning else "softmax"
        sites += [
            Site("norm", number, layer.input_layernorm),
            Site(attention, number, layer.self_attention),
            Site("norm", number, layer.pre_mlp_layernorm),
            Site("router", number, layer.mlp.router),
            Site("experts", number, layer.mlp),
        ]
    sites.append(Site("norm", None, model.decoder.final_layernorm))
    sites.append(Site("head", None, model.output_layer))
    return sites


@dataclass(frozen=True)
class Change:
    """What is done to modules while they are recorded, by the numbers of their sites.

    Attributes:
        inputs: [N, ...] that they read in the place of their own.
        routing: [N, E], the probabilities with which a router sends tokens to experts, and 0 to the
            others, in the place of its own.
        minus: [N, ...] that is taken away from what they write.
    """

    inputs: dict[int, Tensor] = field(default_factory=dict)
    routing: dict[int, Tensor] = field(default_factory=dict)
    minus: dict[int, Tensor] = field(default_factory=dict)


def _nowhere() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class Recording:
    """What each site read and wrote of each token, by number of the site: [N, ...], before a change
    and in the module's own precision. Of a router, probabilities [N, E] as in ``Change``.

    Attributes:
        where: [n] int64, the tokens that the row which runs next begins with.
        wanted: places in that row whose logits the head writes; none where it writes losses.
    """

    tokens: int
    change: Change
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    where: Tensor = field(default_factory=_nowhere)
    wanted: Tensor = field(default_factory=_nowhere)

    def read(self, number: int, rows: Tensor) -> Tensor:
        """What the site is to read in the place of ``rows`` [n + filling, ...]."""
        self._keep(self.inputs, number, rows, self.where)
        return self._replaced(rows, self.change.inputs.get(number))

    def routed(self, number: int, probs: Tensor) -> Tensor:
        """The probabilities to send with in the place of ``probs`` [n + filling, E]."""
        self._keep(self.outputs, number, probs, self.where)
        return self._replaced(probs, self.change.routing.get(number))

    def wrote(self, number: int, rows: Tensor, where: Tensor) -> Tensor:
        """What the site is to have written in the place of ``rows``."""
        self._keep(self.outputs, number, rows, where)
        minus = self.change.minus.get(number)
        if minus is None:
            return rows
        corrected = rows.clone()
        corrected[: len(where)] -= minus[where].to(rows.dtype)
        return corrected

    def _keep(self, kept: dict[int, Tensor], number: int, rows: Tensor, where: Tensor) -> None:
        if number not in kept:
            kept[number] = rows.new_zeros(self.tokens, *rows.shape[1:])
        kept[number][where] = rows[: len(where)].detach()

    def _replaced(self, rows: Tensor, by: Tensor | None) -> Tensor:
        if by is None:
            return rows
        replaced = rows.clone()
        replaced[: len(self.where)] = by[self.where].to(rows.dtype)
        return replaced


@contextmanager
def recording(
    sites: Sequence[Site], tokens: int, change: Change | None = None
) -> Iterator[Recording]:
    """Record and change what the sites do until the block ends. Who runs a row says before which
    tokens it holds."""
    kept = Recording(tokens, change or Change())
    with ExitStack() as stack:
        for number, site in enumerate(sites):
            follow = _follow_router if isinstance(site.module, Float32Router) else _follow
            stack.enter_context(follow(kept, number, site))
        yield kept


@contextmanager
def _follow(kept: Recording, number: int, site: Site) -> Iterator[None]:
    """By hooks on a module of rows [T, 1, ...], which may be the first of two outputs."""

    def before(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        rows = kept.read(number, given[0].flatten(0, 1))
        return rows.view_as(given[0]), *given[1:]

    def after(module: nn.Module, given: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        where = kept.where
        if site.kind == "head":
            if not len(kept.wanted):
                return output
            where = where[kept.wanted]
        rows = kept.wrote(number, first.flatten(0, 1), where).view_as(first)
        if not isinstance(output, tuple):
            return rows
        # A norm's residual is what it writes.
        return tuple(rows if part is first else part for part in output)

    handles = [site.module.register_forward_hook(after)]
    if site.kind != "embedding":
        handles.append(site.module.register_forward_pre_hook(before))
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def _follow_router(kept: Recording, number: int, site: Site) -> Iterator[None]:
    """A router is called in training; generation asks it for assignments."""
    router: Any = site.module

    def after(module: nn.Module, given: Any, output: tuple[Tensor, Tensor]) -> Any:
        kept.read(number, given[0].flatten(0, 1))
        probs = kept.routed(number, output[0])
        return probs, probs > 0

    def assignments(x_NC: Tensor, routing: Routing | None) -> tuple[Tensor, Tensor]:
        kept.read(number, x_NC)
        scores_NK, experts_NK = Float32Router.assignments(router, x_NC, routing)
        own = scores_NK.new_zeros(len(x_NC), router.num_experts).scatter(1, experts_NK, scores_NK)
        probs = kept.routed(number, own)
        return (scores_NK, experts_NK) if probs is own else probs.topk(router.topk)

    handle = router.register_forward_hook(after)
    router.assignments = assignments
    yield
    handle.remove()
    del router.assignments
