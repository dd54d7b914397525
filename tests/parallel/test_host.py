"""Megatron on a machine without an accelerator."""

from __future__ import annotations

import importlib
from importlib.metadata import version

import pytest
import torch

from parallel import host

needs_no_gpu = pytest.mark.skipif(host.has_accelerator(), reason="patches nothing with a GPU")


def test_installed_megatron_is_the_one_that_the_patches_are_for() -> None:
    assert version("megatron-core") == host.MEGATRON_VERSION, (
        f"megatron-core {version('megatron-core')} is installed: read parallel/host.py against it, "
        "then raise MEGATRON_VERSION"
    )


@pytest.mark.parametrize(
    ("module", "name"), [(m, n) for m, names in host.PATCHED_NAMES.items() for n in names]
)
def test_patched_name_exists_in_megatron(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name), (
        f"{module}.{name} is gone from Megatron: the patch in parallel/host.py has no effect"
    )


def test_another_megatron_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "MEGATRON_VERSION", "0.1.0")
    with pytest.raises(RuntimeError, match="parallel/host.py patches 0.1.0"):
        host._check_megatron_version()


@needs_no_gpu
def test_cuda_by_name_is_the_cpu() -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2).to("cuda:0").device.type == "cpu"
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.ones(2).cuda().device.type == "cpu"


@needs_no_gpu
def test_tensor_type_answers_what_the_distributed_optimizer_compares_with() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


@needs_no_gpu
def test_cuda_random_state_is_the_cpu_generator() -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@needs_no_gpu
def test_streams_and_events_accept_what_megatron_asks() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        event = stream.record_event()
    event.synchronize()
    stream.wait_stream(torch.cuda.current_stream())


@needs_no_gpu
def test_torch_compile_is_left_as_it_was() -> None:
    assert torch.compile.__module__ == "torch"


def test_enable_twice_changes_nothing() -> None:
    before = torch.cuda.current_device
    host.enable()
    assert torch.cuda.current_device is before


def test_router_product_works_without_transformer_engine() -> None:
    """It reads a name that Megatron defines only with Transformer Engine."""
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    tokens = torch.ones(2, 1, 3, device=host.device())
    weight = torch.ones(4, 3, device=host.device(), requires_grad=True)
    logits = router_gating_linear(tokens, weight, None, torch.float32)
    logits.sum().backward()
    assert logits.shape == (2, 1, 4)
    assert weight.grad is not None
