"""Routing replay: what it changes in a training forward, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_m1.config import TrainConfig
from megatron_m1.model.build import build_chunks, forward_row, unwrap, wrap_for_training
from megatron_m1.model.routing import EXPERTS, Routing
from megatron_m1.model.schedule import run_schedule
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout
from parallel.packing import PackedRow
from tests.distributed import Pool
from tests.training.small_run import MODEL

TOKENS = 24
PLAIN = replace(MODEL, aux_loss_coef=0.0)


def row_with(experts: Tensor | None) -> PackedRow:
    """Two documents and padding; ``experts`` [T, L, K] as numbers, -1 where they are not given."""
    tokens = torch.arange(TOKENS - 4) * 7 % PLAIN.vocab_size
    row = PackedRow.from_documents([tokens[:13], tokens[13:]], pad_to=TOKENS)
    return row if experts is None else replace(row, extra={EXPERTS: experts + 1})


def chosen_by(layer: Any, row: PackedRow, chunk: torch.nn.Module) -> Tensor:
    """[T, K] experts that one layer sends tokens to in training."""
    found: list[Tensor] = []
    hook = layer.mlp.router.register_forward_hook(
        lambda router, args, output: found.append(output[1].nonzero()[:, 1].view(-1, router.topk))
    )
    forward_row(chunk.train(), row)
    hook.remove()
    return found[0]


def losses_and_gradients(chunk: torch.nn.Module, row: PackedRow) -> list[Tensor]:
    chunk.zero_grad()
    losses = forward_row(chunk.train(), row)
    (losses * row.loss_mask).sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in chunk.parameters() if p.grad is not None)]


@pytest.fixture
def chunk(single_process: Layout) -> torch.nn.Module:
    return build_chunks(PLAIN, transformer_config(PLAIN, Layout()), seed=1)[0]


def own_choice(chunk: torch.nn.Module) -> Tensor:
    row = row_with(None)
    layers = unwrap(chunk).decoder.layers
    return torch.stack([chosen_by(layer, row, chunk) for layer in layers], dim=1).short()


def test_its_own_choice_changes_nothing(chunk: torch.nn.Module) -> None:
    expected = losses_and_gradients(chunk, row_with(None))
    found = losses_and_gradients(chunk, row_with(own_choice(chunk)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_nothing_given_changes_no_bit(chunk: torch.nn.Module) -> None:
    expected = losses_and_gradients(chunk, row_with(None))
    found = losses_and_gradients(chunk, row_with(torch.full((TOKENS, 4, 2), -1)))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_another_choice_changes_that_token_in_that_layer(chunk: torch.nn.Module) -> None:
    own = own_choice(chunk)
    layers, row = unwrap(chunk).decoder.layers, row_with(None)
    other = torch.full_like(own, -1)
    other[5, 2] = torch.tensor([e for e in range(4) if e not in own[5, 2].tolist()])
    replayed = row_with(other)
    for number in range(3):
        expected = own[:, number].clone()
        expected[5] = other[5, 2] if number == 2 else expected[5]
        assert torch.equal(chosen_by(layers[number], replayed, chunk).short(), expected)
    with torch.no_grad():
        changed = (forward_row(chunk, replayed) != forward_row(chunk, row))[0]
    # Token 5 and those after it in its document; none of another.
    assert not changed[:5].any() and changed[5] and not changed[13:].any()


def test_probabilities_are_those_of_current_logits(chunk: torch.nn.Module) -> None:
    router = unwrap(chunk).decoder.layers[1].mlp.router
    hidden = torch.randn(6, 1, PLAIN.hidden_size, requires_grad=True)
    given = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 0], [0, 3], [2, 1]])
    chosen = torch.full((6, 4, 2), -1, dtype=torch.int16)
    routing = Routing(given[:, None].expand(-1, 4, -1) + 1, chosen)
    probs, routed = router.train()(hidden, None, routing)
    logits = hidden[:, 0] @ router.weight.T
    expected = torch.zeros(6, 4).scatter(1, given, logits.gather(1, given).softmax(1))
    torch.testing.assert_close(probs, expected)
    assert torch.equal(routed, expected > 0)
    assert torch.equal(chosen[:, 1].long(), given)
    assert (chosen[:, [0, 2, 3]] == -1).all()
    (probs * torch.randn(6, 4)).sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


LAYOUTS: dict[str, tuple[int, Layout, str]] = {
    "recomputed": (1, Layout(), "selective"),
    "recomputed_whole": (1, Layout(), "full"),
    "tp2": (2, Layout(tp=2), "none"),
    "tp2_whole_rows": (2, Layout(tp=2, sequence_parallel=False), "none"),
    "pp2": (2, Layout(pp=2), "none"),
    "cp2": (2, Layout(cp=2), "none"),
    "ep2_overlap": (2, Layout(ep=2, moe_overlap_groups=2), "selective"),
}


def replayed_loss(layout: Layout, recompute: str) -> float:
    """Sum of the losses of a replayed row, after a backward pass."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_m1.config import OptimConfig

    layout.build_groups()
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    train = TrainConfig(recompute=recompute, recompute_modules=["moe"], precision="fp32")
    config = transformer_config(PLAIN, layout, train)
    chunks = wrap_for_training(build_chunks(PLAIN, config, seed=1), config, OptimConfig())
    generator = torch.Generator().manual_seed(3)
    experts = torch.rand(TOKENS, 4, 4, generator=generator).topk(2).indices.short()
    row = row_with(experts)
    if layout.cp > 1:
        rank = parallel_state.get_context_parallel_rank()
        row = row.cut(layout.cp, rank, layout.cp_cut)
    reports: list[Tensor] = []

    def finish(total: Tensor, row: PackedRow) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        reports.append(total.detach())
        return total, row.loss_mask.sum().int(), {}

    run_schedule(chunks, [row], finish, forward_only=False)
    total = torch.stack(reports).sum() if reports else torch.zeros(())
    torch.distributed.all_reduce(total)
    # Every rank of a tensor-parallel, expert-parallel or data-parallel group has the whole loss.
    size = torch.distributed.get_world_size()
    return float(total) / (size // layout.pp // layout.cp)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_replays_alike(name: str, ranks: Callable[[int], Pool]) -> None:
    (whole,) = ranks(1).run(replayed_loss, Layout(), "none")
    size, layout, recompute = LAYOUTS[name]
    for found in ranks(size).run(replayed_loss, layout, recompute):
        assert found == pytest.approx(whole, rel=1e-5)
