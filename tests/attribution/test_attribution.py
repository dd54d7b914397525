"""Errors that are planted in one kind of the rollout's modules, which must be named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from megatron_m1.attribution.errors import Attribution, attribute
from megatron_m1.attribution.passes import Texts
from megatron_m1.attribution.recording import KINDS, sites_of
from megatron_m1.attribution.text import as_json, describe
from megatron_m1.inference import generation
from megatron_m1.inference.generation import Generator
from megatron_m1.inference.requests import SamplingParams, Sequence
from megatron_m1.model import cache, lm_head
from megatron_m1.model.build import build_chunks, unwrap
from megatron_m1.model.experts import Experts
from megatron_m1.model.norm import RMSNorm
from megatron_m1.model.router import Float32Router
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout
from tests.training.small_run import MODEL

Plant = Callable[[pytest.MonkeyPatch, nn.Module], None]
# More of them than slots, and longer than a piece.
SEQUENCES = [
    Sequence(
        tuple(np.random.RandomState(length).randint(MODEL.vocab_size, size=length)),
        SamplingParams(max_new_tokens=9),
        prompt_id=length,
    )
    for length in (1, 23, 5, 14)
]


def in_rollout(
    patch: pytest.MonkeyPatch, where: Any, name: str, change: Callable[..., Any]
) -> None:
    """Let ``change`` stand around a function; it gets the function first."""
    original = getattr(where, name)
    patch.setattr(where, name, lambda *given, **named: change(original, *given, **named))


def embedding(patch: pytest.MonkeyPatch, chunk: nn.Module) -> None:
    module = unwrap(chunk).embedding.word_embeddings
    in_rollout(patch, module, "forward", lambda f, ids: f(ids) * (1 if module.training else 1.2))


def norm(patch: pytest.MonkeyPatch, chunk: nn.Module) -> None:
    def other_eps(original: Any, module: Any, hidden: Tensor) -> Any:
        module.eps = 1e-5 if module.training else 0.3
        return original(module, hidden)

    in_rollout(patch, RMSNorm, "forward", other_eps)


def lightning(patch: pytest.MonkeyPatch, chunk: nn.Module) -> None:
    def faster(
        original: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, *rest: Any, **named: Any
    ):
        return original(q, k, v, decay * 2, *rest, **named)

    in_rollout(patch, cache, "lightning_decode", faster)


def softmax(patch: pytest.MonkeyPatch, chunk: nn.Module) -> None:
    in_rollout(patch, cache, "attend_next", lambda f, q, *rest: f(q * 3, *rest))
    in_rollout(patch, cache, "attend_one", lambda f, q, *rest: f(q * 3, *rest))


def router(patch: pytest.MonkeyPatch, chunk: nn.Module) -> None:
    def rounded(original: Any, module: Any, hidden: Tensor) -> Tensor:
        logits = original(module, hidden)
        return logits if module.training else logits.bfloat16().float()

    in_rollout(patch, Float32Router, "gating", rounded)


def experts(patch: pytest.MonkeyPatch, chunk: nn.Module) -> None:
    def rounded(original: Any, module: Any, x: Tensor, probs: Tensor, counts: list[int]) -> Tensor:
        return original(module, x, (probs * 1.1).bfloat16().float(), counts)

    in_rollout(patch, Experts, "answers", rounded)


def head(patch: pytest.MonkeyPatch, chunk: nn.Module) -> None:
    in_rollout(
        patch,
        lm_head,
        "few_rows_linear",
        lambda f, x, weight: f(x.bfloat16(), weight.bfloat16()).to(weight.dtype),
    )


def sampler(patch: pytest.MonkeyPatch, chunk: nn.Module) -> None:
    def warmer(original: Any, *given: Any) -> Tensor:
        found = original(*given)
        found[:, 2] *= 1.01
        return found

    in_rollout(patch, generation, "draw", warmer)


PLANTS: dict[str, Plant] = {
    "embedding": embedding,
    "norm": norm,
    "lightning": lightning,
    "softmax": softmax,
    "router": router,
    "experts": experts,
    "head": head,
    "log-probability": sampler,
}


def small_chunk(precision: str) -> nn.Module:
    config = transformer_config(MODEL, Layout(), precision=precision)
    return build_chunks(MODEL, config, seed=1)[0]


def compared(chunk: nn.Module) -> Attribution:
    generator = Generator([chunk], slots=2, prefill_tokens=7)
    return attribute(generator, Texts.drawn(generator, SEQUENCES), row_tokens=40)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def chunk(request: pytest.FixtureRequest, single_process: Layout) -> nn.Module:
    return small_chunk(request.param)


@pytest.fixture(scope="module")
def clean(chunk: nn.Module) -> Attribution:
    return compared(chunk)


def test_nothing_is_named_where_only_the_order_of_sums_differs(clean: Attribution) -> None:
    assert clean.first is None
    assert {module.kind for module in clean.modules} == set(PLANTS)
    assert [module.layer for module in clean.modules if module.kind == "softmax"] == [3]
    assert clean.modules[0].adds == clean.modules[0].leaves == 0
    assert clean.metrics["training/rollout_probs_diff_max"] < 1e-2
    assert "No module adds more than the order of sums explains." in describe(clean)


def test_experts_multiply_by_the_probabilities_of_training(clean: Attribution) -> None:
    """In BF16 too, where rounding them in generation alone would add 2.5e-3."""
    assert clean.most["experts"].adds < 1e-3


def test_what_leaves_a_module_enters_the_next(clean: Attribution) -> None:
    by_place = {(module.kind, module.layer): module for module in clean.modules}
    for layer in range(MODEL.num_layers):
        assert by_place["router", layer].enters == by_place["experts", layer].enters
    last = [module for module in clean.modules if module.kind == "norm"][-1]
    assert by_place["head", None].enters == last.leaves


@pytest.mark.parametrize("kind", PLANTS)
def test_a_planted_error_is_named(
    kind: str, chunk: nn.Module, clean: Attribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    PLANTS[kind](monkeypatch, chunk)
    found = compared(chunk)
    assert found.first is not None and found.first.kind == kind
    assert found.largest.kind == kind
    assert f"They part first in {kind}" in describe(found)
    assert as_json(found)["first"] == as_json(found)["largest"] == kind
    # What enters the first is what a clean rollout brings.
    assert found.first.enters <= 10 * clean.most[kind].enters + 1e-6
    if kind in ("lightning", "softmax", "experts", "embedding"):
        before = found.metrics["training/rollout_probs_diff_mean"]
        assert found.decisive == kind and found.without[kind] < before / 5


def test_flips_of_experts_are_counted(chunk: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def worst(original: Any, module: Any, hidden: Tensor) -> Tensor:
        logits = original(module, hidden)
        return -logits if module.layer_number == 2 and not module.training else logits

    in_rollout(monkeypatch, Float32Router, "gating", worst)
    routers = [module for module in compared(chunk).modules if module.kind == "router"]
    assert [router.adds_flips > 0.9 for router in routers] == [False, True, False, False]
    assert routers[0].flips == routers[0].adds_flips == 0


def test_the_model_is_left_as_it_was(chunk: nn.Module, clean: Attribution) -> None:
    sites = sites_of(chunk)
    assert [kind for kind in KINDS if kind not in {site.kind for site in sites}] == []
    for site in sites:
        assert not site.module._forward_hooks and not site.module._forward_pre_hooks
        assert "assignments" not in vars(site.module)
