"""The bytes that autograd really saves for one layer against the estimate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_m1.config import RunConfig, TrainConfig
from megatron_m1.model.build import build_chunks, sum_of_losses
from megatron_m1.model.config import LIGHTNING, SOFTMAX, ModelConfig
from megatron_m1.model.transformer_config import transformer_config
from megatron_m1.planning import activations
from megatron_m1.planning.activations import layer_bytes
from megatron_m1.planning.config import RECOMPUTE
from megatron_m1.planning.stages import Stage
from parallel.layout import Layout
from parallel.packing import PackedRow

T = 512
SHARED = 16
"""Bytes a token that all layers together keep: cosines and sines of positions, tokens."""


class NormOfGpu(torch.autograd.Function):
    """Saves what PyTorch's norm on a GPU saves; on a CPU it is several operations, each of which
    saves its own."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (hidden.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden.float() * scale * weight).to(hidden.dtype)


@pytest.fixture(autouse=True)
def norm_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        F, "rms_norm", lambda x, shape, weight, eps: NormOfGpu.apply(x, weight, eps)
    )


def run_config(layers: int, kind: str, precision: str, recompute: str) -> RunConfig:
    model = ModelConfig(num_layers=layers, layer_pattern=kind, vocab_size=64, aux_loss_coef=0.0)
    name, modules = RECOMPUTE[recompute]
    train = TrainConfig(
        seq_length=T, precision=precision, recompute=name, recompute_modules=list(modules)
    )
    return RunConfig(model=model, train=train)


def saved_bytes(config: RunConfig) -> float:
    """Bytes a token of the storages, each once, that one forward pass leaves behind."""
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    megatron = transformer_config(
        config.model, config.parallel, config.train, precision=config.train.precision
    )
    (chunk,) = build_chunks(config.model, megatron, seed=1)
    weights = {weight.untyped_storage().data_ptr() for weight in chunk.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # Keeping the tensor keeps its address from being given to another.
            saved[storage.data_ptr()] = tensor
        return tensor

    row = PackedRow.from_documents([torch.arange(T) % config.model.vocab_size])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sum_of_losses(chunk.train(), row)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / T


CASES = [
    (kind, precision, recompute)
    for kind in (LIGHTNING, SOFTMAX)
    for precision in ("bf16", "fp32")
    for recompute in RECOMPUTE
]


@pytest.mark.parametrize(("kind", "precision", "recompute"), CASES)
def test_bytes_of_a_layer(
    kind: str, precision: str, recompute: str, single_process: Layout
) -> None:
    two, three = (run_config(layers, kind, precision, recompute) for layers in (2, 3))
    real = saved_bytes(three) - saved_bytes(two)
    assert layer_bytes(two, kind) == pytest.approx(real, rel=0.02, abs=SHARED)


def test_recomputation_keeps_less() -> None:
    kept = {
        recompute: layer_bytes(run_config(2, SOFTMAX, "bf16", recompute), SOFTMAX)
        for recompute in RECOMPUTE
    }
    assert kept["full"] < kept["core_attn+moe"] < kept["moe"] < kept["core_attn"] < kept["none"]


def stages(pp: int) -> Iterator[Stage]:
    return (Stage(rank, LIGHTNING, rank == 0, rank == pp - 1) for rank in range(pp))


def test_later_stages_hold_fewer_micro_batches() -> None:
    config = run_config(4, LIGHTNING, "bf16", "none")
    config.parallel, config.train.global_batch = Layout(pp=4), 16
    assert [activations.in_flight(config, 4, stage) for stage in stages(4)] == [4, 3, 2, 1]
    # (2 (pp - 1) + (vpp - 1) pp + 1) / vpp of Megatron's interleaved warm-up.
    config.parallel = Layout(pp=4, vpp=2)
    assert [activations.in_flight(config, 4, stage) for stage in stages(4)] == [5.5, 4.5, 3.5, 2.5]
    config.train.global_batch = 2
    assert [activations.in_flight(config, 4, stage) for stage in stages(4)] == [2, 2, 2, 2]
