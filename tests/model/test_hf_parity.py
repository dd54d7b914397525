"""The whole model against transformers' MiniMaxForCausalLM with the same weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from megatron_m1.model.build import build_chunks, forward_row, unwrap
from megatron_m1.model.config import LIGHTNING, ModelConfig
from megatron_m1.model.lightning_attention import decay_slopes
from megatron_m1.model.parameters import load_parameters, local_parameters
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout
from parallel.packing import PackedRow
from tests.model.hf_oracle import Oracle
from tools.hf_minimax import hf_config

TINY = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    rotary_dim=16,
    ffn_hidden_size=24,
    num_experts=4,
    vocab_size=96,
    aux_loss_coef=0.0,
)


@dataclass(frozen=True)
class Case:
    """Sizes that differ from TINY, and the lengths of the documents."""

    lengths: tuple[int, ...]
    sizes: dict

    @property
    def model(self) -> ModelConfig:
        return replace(TINY, **self.sizes)

    def documents(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(len(self.lengths))
        return [
            torch.randint(self.model.vocab_size, (length,), generator=generator)
            for length in self.lengths
        ]


CASES = {
    "lightning": Case((80,), {"layer_pattern": "L"}),
    "one lightning layer": Case((80,), {"layer_pattern": "L", "num_layers": 1}),
    "one head": Case((33,), {"num_attention_heads": 1, "num_query_groups": 1}),
    "softmax": Case((80,), {"layer_pattern": "S", "num_query_groups": 4}),
    "batch": Case((64, 64, 64), {"layer_pattern": "SL"}),
    "one key head": Case((75, 75), {"layer_pattern": "SL", "num_query_groups": 1}),
    "width of heads": Case((67,), {"layer_pattern": "SL", "head_dim": 24, "rotary_dim": 24}),
    "partial rotation": Case((67,), {"layer_pattern": "S", "rotary_dim": 8}),
    "eight layers": Case((100,), {"layer_pattern": "LLLLLLLS", "num_layers": 8}),
    "eight layers, documents": Case(
        (7, 70, 1, 33), {"layer_pattern": "LLLLLLLS", "num_layers": 8, "rotary_dim": 8}
    ),
}


def our_model(
    model: ModelConfig, layout: Layout, weights: dict[str, Tensor], precision: str = "fp32"
) -> nn.Module:
    """Our model with weights in MiniMax's names, each of which must be read once."""
    (chunk,) = build_chunks(
        model, transformer_config(model, layout, precision=precision), seed=None
    )
    unread = dict(weights)

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        assert unread[name].shape == shape
        return unread.pop(name)

    load_parameters(unwrap(chunk), model, read)
    assert not unread
    return chunk


def mean_loss(chunk: nn.Module, row: PackedRow) -> Tensor:
    losses = forward_row(chunk, row).view(-1)
    return (losses * row.loss_mask).sum() / row.loss_mask.sum()


def our_gradients(chunk: nn.Module, model: ModelConfig) -> dict[str, Tensor]:
    found = {}
    for local in local_parameters(chunk, model):
        assert local.parameter.grad is not None, local.mapped.ours
        operation = local.mapped.operation
        tensors = operation.unpack(operation.view(local.parameter.grad, model), model)
        names = [name for name, _ in local.mapped.theirs]
        found.update(zip(names, tensors, strict=True))
    return found


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(name: str, single_process: Layout) -> None:
    case = CASES[name]
    oracle = Oracle(case.model)
    documents = case.documents()
    expected_logits, expected_loss = oracle.run(documents)
    expected_loss.backward()
    assert 1 < expected_logits.std() < 4

    chunk = our_model(case.model, single_process, oracle.weights())
    row = PackedRow.from_documents(documents)
    with torch.no_grad():
        logits = forward_row(chunk, row, with_loss=False)[0]
    assert (logits - expected_logits).abs().max() < 1e-4
    loss = mean_loss(chunk, row)
    assert abs(loss - expected_loss) < 1e-5
    loss.backward()
    assert_same_gradients(our_gradients(chunk, case.model), oracle.gradients())


def test_packed_documents_do_not_meet(single_process: Layout) -> None:
    case = CASES["eight layers, documents"]
    chunk = our_model(case.model, single_process, Oracle(case.model).weights())
    documents = case.documents()
    with torch.no_grad():
        packed = forward_row(chunk, PackedRow.from_documents(documents), with_loss=False)[0]
        alone = [
            forward_row(chunk, PackedRow.from_documents([document]), with_loss=False)[0]
            for document in documents
        ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=0)


def test_bf16_is_close_and_keeps_float32_where_it_must(single_process: Layout) -> None:
    case = CASES["eight layers"]
    weights = Oracle(case.model).weights()
    row = PackedRow.from_documents(case.documents())
    chunk = our_model(case.model, single_process, weights, "bf16")
    with torch.no_grad():
        exact = mean_loss(our_model(case.model, single_process, weights), row)
        close = mean_loss(chunk, row)
    assert close.dtype == torch.float32
    assert abs(close / exact - 1) < 0.02

    kept = {n for n, p in unwrap(chunk).named_parameters() if p.dtype == torch.float32}
    routers = {f"decoder.layers.{layer}.mlp.router.weight" for layer in range(8)}
    assert kept == {"output_layer.weight", *routers}
    for number, layer in enumerate(unwrap(chunk).decoder.layers):
        if case.model.layer_kinds[number] == LIGHTNING:
            decay = layer.self_attention.decay
            assert decay.dtype == torch.float32
            assert torch.equal(decay, decay_slopes(case.model.num_attention_heads, number, 8))


@pytest.mark.parametrize("num_layers", [8, 80])
def test_decay_slopes(num_layers: int) -> None:
    config = hf_config(replace(TINY, num_layers=num_layers, num_attention_heads=8))
    config.layer_types = ["linear_attention"] * num_layers
    for layer in range(num_layers):
        expected = MiniMaxLightningAttention(config, layer).slope_rate.flatten()
        ours = decay_slopes(8, layer, num_layers)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_decay_slopes_of_other_head_counts_follow_alibi() -> None:
    """ALiBi (arXiv 2108.12409) and its code: the slopes of the next lower power of two, then every
    second one of the next higher."""
    slopes = decay_slopes(6, 0, 80) / (1 + 1e-5)
    expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    torch.testing.assert_close(slopes, torch.tensor(expected))
    assert math.isclose(decay_slopes(64, 0, 80)[0], 2 ** (-1 / 8) * (1 + 1e-5), rel_tol=1e-6)
