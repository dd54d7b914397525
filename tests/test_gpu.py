"""On a CUDA device: the same kernels, a bfloat16 step, a run that learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.attention import varlen_attention
from kernels.lightning import lightning_attention
from megatron_m1.pretrain import pretrain
from parallel.layout import Layout
from tests.training.small_run import small_config, write_data

pytestmark = pytest.mark.gpu
CU_SEQLENS = torch.tensor([0, 1, 70, 70, 300], dtype=torch.int32)


@pytest.mark.parametrize("kernel", ["lightning", "attention"])
def test_portable_kernels_equal_their_reference(kernel: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(300, 4, 32, device="cuda", requires_grad=True) for _ in range(3))
    upstream = torch.randn(300, 4, 32, device="cuda")
    results = []
    for backend in ("portable", "reference"):
        if kernel == "lightning":
            decay = torch.tensor([0.0, 0.01, 0.5, 9.0], device="cuda")
            packed = [x[None] for x in (q, k, v)]
            out = lightning_attention(*packed, decay, cu_seqlens=CU_SEQLENS, backend=backend)[0]
        else:
            out, _ = varlen_attention(q, k, v, CU_SEQLENS, backend=backend)
        results.append((out, *torch.autograd.grad(out, (q, k, v), upstream)))
    for portable, reference in zip(*results, strict=True):
        torch.testing.assert_close(portable, reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_learns(single_process: Layout, tmp_path: Path, precision: str) -> None:
    config = small_config(str(tmp_path), write_data(tmp_path))
    run = pretrain(replace(config, train=replace(config.train, precision=precision, steps=20)))
    lines = (run.dir / "metrics.jsonl").read_text().splitlines()
    losses = [
        record["train/loss"] for line in lines if "train/loss" in (record := json.loads(line))
    ]
    assert losses[-1] < losses[0] - 0.5
