"""The head: its precision, losses without logits, and its slices of the vocabulary over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.logprob import slices
from megatron_m1.model.build import build_chunks, forward_row, sum_of_losses, unwrap
from megatron_m1.model.lm_head import LMHead
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout
from parallel.packing import PackedRow
from tests.distributed import Pool
from tests.training.small_run import MODEL

ROW = PackedRow.from_documents([torch.arange(20), torch.arange(40, 44)])
T = len(ROW)


def build(fp32_head: bool, precision: str = "bf16", **sizes: Any) -> nn.Module:
    model = replace(MODEL, fp32_lm_head=fp32_head, **sizes)
    (chunk,) = build_chunks(model, transformer_config(model, Layout(), precision=precision), seed=3)
    return chunk


def gradients(chunk: nn.Module, total: Tensor) -> dict[str, Tensor]:
    chunk.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in chunk.named_parameters() if p.grad is not None}


def assert_same_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], bound: float
) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).float().norm() / gradient.float().norm().clamp(min=1e-6)
        assert error < bound, (name, error)


def test_fp32_head_keeps_weights_product_and_gradient_in_fp32(single_process: Layout) -> None:
    chunk = build(True)
    logits, head = forward_row(chunk, ROW, with_loss=False), unwrap(chunk).output_layer
    # More than bfloat16's eight bits of mantissa are there.
    assert not torch.equal(logits.float(), logits.bfloat16().float())
    sum_of_losses(chunk, ROW).backward()
    assert head.weight.dtype == head.weight.grad.dtype == torch.float32
    assert not torch.equal(head.weight.grad, head.weight.grad.bfloat16().float())


def test_without_it_logits_have_bfloat16_precision(single_process: Layout) -> None:
    chunk = build(False)
    logits, head = forward_row(chunk, ROW, with_loss=False), unwrap(chunk).output_layer
    assert head.weight.dtype == torch.bfloat16
    assert torch.equal(logits.float(), logits.bfloat16().float())


def test_everything_else_is_bfloat16_but_the_router(single_process: Layout) -> None:
    chunk = build(True)
    for name, parameter in chunk.named_parameters():
        kept = "router" in name or "output_layer" in name
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    for layer in unwrap(chunk).decoder.layers[:3]:
        assert layer.self_attention.decay.dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "fp32_head", "bound"),
    [("fp32", True, 1e-5), ("bf16", True, 1e-2), ("bf16", False, 2e-2)],
)
def test_losses_and_gradients_are_those_of_the_logits(
    precision: str, fp32_head: bool, bound: float, single_process: Layout
) -> None:
    chunk = build(fp32_head, precision)
    log_p = forward_row(chunk, ROW, with_loss=False)[0].log_softmax(-1)
    losses = -log_p.gather(1, ROW.labels[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    masked = (losses * ROW.loss_mask).sum()
    expected = gradients(chunk, masked)

    found = forward_row(chunk, ROW)
    assert found.shape == (1, T) and found.dtype == torch.float32
    torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(chunk, (found[0] * ROW.loss_mask).sum()), expected, bound)

    total = sum_of_losses(chunk, ROW)
    torch.testing.assert_close(total, masked, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(chunk, total), expected, bound)

    both = forward_row(chunk, ROW, with_entropy=True)
    assert both.shape == (2, T)
    torch.testing.assert_close(both, torch.stack([losses, entropy]), rtol=1e-5, atol=1e-5)
    log_p = forward_row(chunk, ROW, with_loss=False)[0].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    expected = gradients(chunk, entropy.sum())
    assert_same_gradients(gradients(chunk, both[1].sum()), expected, bound)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *made])
        return result


def test_no_loss_makes_logits_of_the_whole_row(
    single_process: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "CHUNK_BYTES", 0)
    monkeypatch.setattr(slices, "LEAST_ROWS", 8)
    chunk = build(True, "fp32", vocab_size=4096, hidden_size=4)
    for run in (sum_of_losses, forward_row, lambda *x: forward_row(*x, with_entropy=True)):
        with Largest() as largest:
            run(chunk, ROW).sum().backward()
        assert largest.elements == 8 * 4096
    with Largest() as largest:
        forward_row(chunk, ROW, with_loss=False)
    assert largest.elements == T * 4096


WIDTH, VOCABULARY = 16, 24


def head_of_a_rank(layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs of the head, and gradients of this rank's part, from the same tensors everywhere."""
    layout.build_groups()
    group = parallel_state.get_tensor_model_parallel_group()
    head = LMHead(
        WIDTH,
        VOCABULARY,
        config=transformer_config(replace(MODEL, hidden_size=WIDTH), layout),
        in_fp32=True,
        init_method=None,
        bias=False,
        skip_bias_add=False,
        gather_output=False,
        tp_group=group,
    )
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(VOCABULARY, WIDTH, generator=generator)
    with torch.no_grad():
        head.weight.copy_(whole.chunk(layout.tp)[group.rank()])
    hidden = torch.randn(12, 1, WIDTH, generator=generator).to(dtype)
    if layout.uses_sequence_parallel:
        hidden = hidden.chunk(layout.tp)[group.rank()]
    hidden = hidden.clone().requires_grad_()
    labels = torch.randint(VOCABULARY, (12,), generator=generator)
    mask = torch.rand(12, generator=generator)
    upstream = torch.randn(2, 12, generator=generator)

    both, _ = head(hidden, labels=labels, with_entropy=True)
    found = {"both": both.detach()}
    found["d_hidden"], found["d_weight"] = torch.autograd.grad(
        both, (hidden, head.weight), upstream
    )
    with patch.object(slices, "CHUNK_BYTES", 0), patch.object(slices, "LEAST_ROWS", 5):
        total, _ = head(hidden, labels=labels, loss_mask=mask)
    found["total"] = total.detach()
    found["d_hidden_of_sum"], found["d_weight_of_sum"] = torch.autograd.grad(
        total, (hidden, head.weight)
    )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layout", [Layout(tp=2, sequence_parallel=False), Layout(tp=2), Layout(tp=4)], ids=str
)
def test_ranks_share_the_vocabulary(
    layout: Layout, dtype: torch.dtype, ranks: Callable[[int], Pool]
) -> None:
    (expected,) = ranks(1).run(head_of_a_rank, Layout(), dtype)
    parts = ranks(layout.tp).run(head_of_a_rank, layout, dtype)
    # What bfloat16 adds is the rounding of the hidden states' whole gradient, no more.
    bound = {"rtol": 1e-5 if dtype == torch.float32 else 8e-3, "atol": 1e-6}
    for name in ("both", "total"):
        for part in parts:
            torch.testing.assert_close(part[name], expected[name], rtol=1e-5, atol=1e-5)
    for name in ("d_hidden", "d_hidden_of_sum"):
        found = [part[name] for part in parts]
        whole = torch.cat(found) if layout.uses_sequence_parallel else found[0]
        assert layout.uses_sequence_parallel or all(torch.equal(whole, part) for part in found)
        torch.testing.assert_close(whole, expected[name], **bound)
    for name in ("d_weight", "d_weight_of_sum"):
        whole = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(whole, expected[name], rtol=1e-5, atol=1e-6)
