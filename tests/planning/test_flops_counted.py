"""The formulas against the products that PyTorch really dispatches, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from kernels.lightning.chunks import CHUNK
from megatron_m1.model.build import build_chunks, forward_row, sum_of_losses
from megatron_m1.model.config import LIGHTNING, SOFTMAX, ModelConfig
from megatron_m1.model.transformer_config import transformer_config
from megatron_m1.planning import flops
from parallel.layout import Layout
from parallel.packing import PackedRow

T = 512
MODEL = ModelConfig(aux_loss_coef=0.0)
KEYS = (T + 1) / 2
LAYERS = "MiniMaxM1.decoder.layers"


def added_product(_: Any, a: tuple[int, ...], b: tuple[int, ...], *rest: Any, **more: Any) -> int:
    """x += a b, [..., n, m] by [..., m, k]."""
    return 2 * torch.Size(a).numel() * b[-1]


def causal(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> int:
    """Of one row: half of the square, with the diagonal."""
    return sdpa_flop_count(q, k, v) * (T + 1) // (2 * T)


def attention(q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> int:
    return causal(q, k, v)


def attention_backward(d_out: Any, q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> int:
    """Five products for the forward's two (arXiv 2307.08691, algorithm 2)."""
    return causal(q, k, v) * 5 // 2


# What the counter does not know by itself.
UNKNOWN = {
    torch.ops.aten.addmm_: added_product,
    torch.ops.aten.baddbmm_: added_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def counted(run: Callable[[], Any]) -> FlopCounterMode:
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        run()
    return counter


@pytest.fixture(scope="module")
def chunk(single_process: Layout) -> torch.nn.Module:
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = transformer_config(MODEL, single_process)
    (chunk,) = build_chunks(MODEL, config, seed=1)
    return chunk.train()


@pytest.fixture(scope="module")
def row() -> PackedRow:
    generator = torch.Generator().manual_seed(1)
    return PackedRow.from_documents([torch.randint(MODEL.vocab_size, (T,), generator=generator)])


def test_forward_piece_by_piece(chunk: torch.nn.Module, row: PackedRow) -> None:
    counter = counted(lambda: forward_row(chunk, row, with_loss=False))
    found = {
        name: sum(operations.values()) / T for name, operations in counter.get_flop_counts().items()
    }
    lightning = MODEL.layer_flops(LIGHTNING, KEYS)
    softmax = MODEL.layer_flops(SOFTMAX, KEYS)
    assert found[f"{LAYERS}.0.mlp.experts"] == lightning["experts"]
    assert found[f"{LAYERS}.0.mlp.router"] == lightning["router"]
    mixer = f"{LAYERS}.7.self_attention"
    assert found[mixer] == pytest.approx(softmax["projections"] + softmax["attention"], rel=1e-6)
    mixer = f"{LAYERS}.0.self_attention"
    projections = sum(found[f"{mixer}.linear_{name}"] for name in ("qkv", "gate", "proj"))
    assert projections == lightning["projections"]
    # Chunks are a fifth more than the formula: states are carried over all chunks of a segment.
    assert found[mixer] - projections == pytest.approx(
        flops.blocked_lightning(MODEL, CHUNK), rel=0.2
    )
    assert found["MiniMaxM1.output_layer"] == MODEL.forward_flops(KEYS)["head"]


def test_forward_of_the_whole_model(chunk: torch.nn.Module, row: PackedRow) -> None:
    total = counted(lambda: forward_row(chunk, row, with_loss=False)).get_total_flops() / T
    assert total == pytest.approx(sum(MODEL.forward_flops(KEYS).values()), rel=0.05)


def test_forward_and_backward(chunk: torch.nn.Module, row: PackedRow) -> None:
    """Three forwards, and 5 % for what flash attention and lightning's chunks compute again."""
    total = counted(lambda: sum_of_losses(chunk, row).backward()).get_total_flops() / T
    model = 3 * sum(MODEL.forward_flops(KEYS).values())
    assert model < total < 1.06 * model
