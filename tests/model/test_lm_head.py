"""The FP32 head in a bfloat16 model."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_m1.model.build import build_chunks, forward_row, unwrap
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout
from parallel.packing import PackedRow
from tests.training.small_run import MODEL

ROW = PackedRow.from_documents([torch.arange(20)])


def logits_and_head(fp32_head: bool) -> tuple[torch.Tensor, torch.nn.Module]:
    model = replace(MODEL, fp32_lm_head=fp32_head)
    (chunk,) = build_chunks(model, transformer_config(model, Layout(), precision="bf16"), seed=3)
    return forward_row(chunk, ROW, with_loss=False), unwrap(chunk).output_layer


def test_fp32_head_keeps_weights_product_and_gradient_in_fp32(single_process: Layout) -> None:
    logits, head = logits_and_head(True)
    logits.float().logsumexp(-1).sum().backward()
    assert head.weight.dtype == head.weight.grad.dtype == torch.float32
    # More than bfloat16's eight bits of mantissa are there.
    assert not torch.equal(logits.float(), logits.bfloat16().float())


def test_without_it_logits_have_bfloat16_precision(single_process: Layout) -> None:
    logits, head = logits_and_head(False)
    assert head.weight.dtype == torch.bfloat16
    assert torch.equal(logits.float(), logits.bfloat16().float())


def test_everything_else_is_bfloat16_but_the_router(single_process: Layout) -> None:
    (chunk,) = build_chunks(MODEL, transformer_config(MODEL, Layout(), precision="bf16"), seed=3)
    for name, parameter in chunk.named_parameters():
        kept = "router" in name or "output_layer" in name
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    for layer in unwrap(chunk).decoder.layers[:3]:
        assert layer.self_attention.decay.dtype == torch.float32
