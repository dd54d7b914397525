"""The router: FP32 inside a lower-precision model, counted once, dropping beyond capacity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_m1.config import TrainConfig
from megatron_m1.errors import ConfigError
from megatron_m1.model.build import build_chunks, forward_row, unwrap
from megatron_m1.model.config import ModelConfig
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout
from parallel.packing import PackedRow
from tests.training.small_run import MODEL


def row(tokens: int = 40) -> PackedRow:
    torch.manual_seed(0)
    return PackedRow.from_documents([torch.randint(0, MODEL.vocab_size, (tokens,))])


def build(model: ModelConfig, train: TrainConfig | None = None) -> torch.nn.Module:
    (chunk,) = build_chunks(model, transformer_config(model, Layout(), train), seed=3)
    return chunk.train()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_each_token_is_counted_once(single_process: Layout, recompute: str) -> None:
    train = TrainConfig(recompute=recompute, recompute_modules=["core_attn", "moe"])
    chunk = build(MODEL, train)
    forward_row(chunk, row()).sum().backward()
    for layer in unwrap(chunk).decoder.layers:
        routed, offered = layer.mlp.router.take_counts()
        assert offered.sum() == 40 * MODEL.router_topk
        assert torch.equal(routed, offered)
        assert layer.mlp.router.take_counts().sum() == 0


def test_evaluation_is_not_counted(single_process: Layout) -> None:
    chunk = build(MODEL).eval()
    with torch.no_grad():
        forward_row(chunk, row())
    assert unwrap(chunk).decoder.layers[0].mlp.router.take_counts().sum() == 0


def test_capacity_drops_tokens(single_process: Layout) -> None:
    chunk = build(replace(MODEL, capacity_factor=0.5))
    loss = forward_row(chunk, row())
    loss.sum().backward()
    assert loss.isfinite().all()
    routed, offered = unwrap(chunk).decoder.layers[0].mlp.router.take_counts()
    # An expert takes at most half its fair share: 40 tokens * 2 / 4 experts * 0.5.
    assert routed.max() <= 10
    assert routed.sum() <= offered.sum() / 2


def test_deepep_names_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, answer in (("HAVE_DEEP_EP", False), ("has_accelerator", lambda: False)):
        monkeypatch.setattr(f"megatron_m1.model.transformer_config.{name}", answer)
    layout = Layout(ep=2, moe_dispatcher="deepep")
    with pytest.raises(
        ConfigError, match=r"needs the package deep_ep \(DeepEP\) and a CUDA device"
    ):
        transformer_config(MODEL, layout, precision="bf16")


def test_balancing_loss_reaches_the_router(single_process: Layout) -> None:
    def gradient(coefficient: float) -> torch.Tensor:
        chunk = build(replace(MODEL, aux_loss_coef=coefficient))
        forward_row(chunk, row()).sum().backward()
        return unwrap(chunk).decoder.layers[0].mlp.router.weight.grad

    assert not torch.allclose(gradient(0.0), gradient(0.1))


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_padding_changes_nothing(single_process: Layout, capacity: float | None) -> None:
    model = replace(MODEL, aux_loss_coef=1.0, z_loss_coef=0.1, capacity_factor=capacity)

    def learned(row: PackedRow) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Counts and weight gradient of every router."""
        chunk = build(model)
        (forward_row(chunk, row).view(-1) * row.loss_mask).sum().backward()
        routers = [layer.mlp.router for layer in unwrap(chunk).decoder.layers]
        return [r.take_counts() for r in routers], [r.weight.grad for r in routers]

    counts, gradients = learned(row())
    padded_counts, padded_gradients = learned(row().padded(64))
    assert all(map(torch.equal, counts, padded_counts))
    for gradient, padded in zip(gradients, padded_gradients, strict=True):
        torch.testing.assert_close(padded, gradient, rtol=1e-4, atol=1e-5)
