"""What each module adds to the difference between rollout and trainer, and what comes of it.

An error is relative: the Euclidean norm of the difference over all tokens, over that of what the
trainer has. What a module *adds* is the error of its output when the rollout's module reads what
the trainer's read, so that nothing of the modules before it is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_m1.attribution.passes import Texts, roll_out, train
from megatron_m1.attribution.recording import (
    KINDS,
    Change,
    Recording,
    Site,
    sites_of,
)
from megatron_m1.inference.generation import Generator
from megatron_m1.rl.mismatch import mismatch_metrics, mismatch_sums

LOGPROB = "log-probability"
"""The kind of the last step, from logits to the log-probability of a token."""

_FLOAT32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class ModuleError:
    """One module.

    Attributes:
        layer: 0-based; None outside of the layers.
        enters, leaves: relative error of what it reads (0 for token ids) and of what it writes.
        adds: relative error of what it writes when it reads what the trainer's read.
        flips, adds_flips: of a router, the share of tokens that go to other experts, in the same
            two ways.
        arithmetic: up to which the order of sums may explain what it adds: two roundings of the
            precision that it writes in, and sixteen of FP32, in which sums are made.
    """

    kind: str
    layer: int | None
    enters: float
    leaves: float
    adds: float
    arithmetic: float
    flips: float | None = None
    adds_flips: float | None = None

    @property
    def is_beyond_arithmetic(self) -> bool:
        return self.adds > self.arithmetic


@dataclass(frozen=True)
class Attribution:
    """The whole comparison.

    Attributes:
        modules: in the order in which a token meets them.
        metrics: of the tokens' probabilities, as training records them.
        without: mean difference of the probabilities that is left where what one kind adds is taken
            away, in all layers, by kind.
    """

    modules: list[ModuleError]
    metrics: dict[str, float]
    without: dict[str, float]

    @property
    def first(self) -> ModuleError | None:
        """The first module that adds more than arithmetic does."""
        return next((module for module in self.modules if module.is_beyond_arithmetic), None)

    @property
    def most(self) -> dict[str, ModuleError]:
        """The module of each kind that adds most, by kind."""
        found: dict[str, ModuleError] = {}
        for module in self.modules:
            if module.kind not in found or module.adds > found[module.kind].adds:
                found[module.kind] = module
        return found

    @property
    def largest(self) -> ModuleError:
        """The module that adds most, as a multiple of what arithmetic may."""
        return max(self.modules, key=lambda module: module.adds / module.arithmetic)

    @property
    def decisive(self) -> str:
        """The kind without which least is left of the difference of the probabilities."""
        return min(self.without, key=self.without.__getitem__)


def attribute(generator: Generator, texts: Texts, row_tokens: int) -> Attribution:
    """Compare the two computations of ``texts`` by the one chunk of the whole model.

    Args:
        row_tokens: of the trainer's rows.
    """
    comparison = _Comparison.of(generator, texts, row_tokens)
    sums = mismatch_sums(texts.logprobs, comparison.logprobs, torch.ones_like(texts.logprobs))
    return Attribution(
        [*map(comparison.module, range(len(comparison.sites))), comparison.last_step()],
        mismatch_metrics(sums.metrics()),
        {kind: comparison.without(kind) for kind in KINDS if comparison.has(kind)},
    )


@dataclass(frozen=True)
class _Comparison:
    """The passes over the same tokens.

    Attributes:
        logprobs: [R] float64, the trainer's.
        alone: each of the rollout's modules on what the trainer's read, tokens going to the experts
            that the trainer sends them to.
    """

    generator: Generator
    texts: Texts
    sites: list[Site]
    trained: Recording
    logprobs: Tensor
    rolled: Recording
    alone: Recording

    @classmethod
    def of(cls, generator: Generator, texts: Texts, row_tokens: int) -> _Comparison:
        (chunk,) = generator.chunks
        sites = sites_of(chunk)
        trained, logprobs = train(chunk, sites, texts, row_tokens)
        rolled = roll_out(generator, sites, texts)
        change = Change(trained.inputs, _routing(sites, trained))
        alone = roll_out(generator, sites, texts, change)
        return cls(generator, texts, sites, trained, logprobs, rolled, alone)

    def has(self, kind: str) -> bool:
        return any(site.kind == kind for site in self.sites)

    def module(self, number: int) -> ModuleError:
        site = self.sites[number]
        is_router = site.kind == "router"
        # Generation asks for the logits of tokens alone that predict.
        compared = self.texts.predicting if site.kind == "head" else slice(None)
        ours, theirs, isolated = (
            kept.outputs[number][compared] for kept in (self.trained, self.rolled, self.alone)
        )
        enters = 0.0
        if number in self.trained.inputs:
            enters = _relative(self.rolled.inputs[number], self.trained.inputs[number])
        return ModuleError(
            site.kind,
            site.layer,
            enters,
            _relative(theirs, ours),
            _relative(isolated, ours),
            2 * torch.finfo(ours.dtype).eps + 16 * _FLOAT32,
            _flips(theirs, ours) if is_router else None,
            _flips(isolated, ours) if is_router else None,
        )

    def last_step(self) -> ModuleError:
        """What engine and loss make of logits, against the definition on the logits of each."""
        theirs, ours = self._defined(self.rolled), self._defined(self.trained)
        added = (self.texts.logprobs - theirs) - (self.logprobs - ours)
        return ModuleError(
            LOGPROB,
            None,
            _relative(theirs, ours),
            _relative(self.texts.logprobs, self.logprobs),
            _relative(self.logprobs + added, self.logprobs),
            18 * _FLOAT32,
        )

    def without(self, kind: str) -> float:
        """Mean difference of the probabilities in a rollout less what the modules of a kind add. In
        the place of the routers' choices stand the trainer's, with their probabilities."""
        minus = {
            number: self.alone.outputs[number].double() - self.trained.outputs[number].double()
            for number, site in enumerate(self.sites)
            if site.kind == kind != "router"
        }
        routing = _routing(self.sites, self.trained) if kind == "router" else {}
        change = Change(routing=routing, minus=minus)
        changed = roll_out(self.generator, self.sites, self.texts, change)
        return float((self._defined(changed).exp() - self.logprobs.exp()).abs().mean())

    def _defined(self, kept: Recording) -> Tensor:
        """[R] float64, log softmax of a recording's logits at the tokens of the responses."""
        logits_RV = kept.outputs[len(self.sites) - 1][self.texts.predicting].double()
        return logits_RV.log_softmax(-1).gather(1, self.texts.targets[:, None])[:, 0]


def _routing(sites: list[Site], kept: Recording) -> dict[int, Tensor]:
    return {number: kept.outputs[number] for number, s in enumerate(sites) if s.kind == "router"}


def _relative(found: Tensor, expected: Tensor) -> float:
    difference = float((found.double() - expected.double()).norm())
    return difference / float(expected.double().norm()) if difference else 0.0


def _flips(found_NE: Tensor, expected_NE: Tensor) -> float:
    return float(((found_NE > 0) != (expected_NE > 0)).any(-1).double().mean())
