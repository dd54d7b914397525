"""Our experts against Megatron's own loop, on outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.experts import Experts
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout

MODEL = ModelConfig(hidden_size=32, ffn_hidden_size=24, num_experts=4)


def build(kind: type[SequentialMLP], layout: Layout, precision: str) -> SequentialMLP:
    _, linears = LocalSpecProvider().grouped_mlp_modules(False, moe_use_legacy_grouped_gemm=False)
    config = transformer_config(MODEL, layout, precision=precision)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    experts = kind(MODEL.num_experts, config, linears, pg_collection=groups)
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return experts


def run(experts: SequentialMLP, counts: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and every gradient by name."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(sum(counts), MODEL.hidden_size, generator=generator).to(dtype)
    probs = torch.rand(sum(counts), generator=generator)
    d_output = torch.randn(tokens.shape, generator=generator).to(dtype)
    tokens.requires_grad_(), probs.requires_grad_()
    output, bias = experts(tokens, torch.tensor(counts), probs)
    assert bias is None
    output.backward(d_output)
    found = {"output": output, "tokens": tokens.grad, "probs": probs.grad}
    return found | {name: parameter.grad for name, parameter in experts.named_parameters()}


@pytest.mark.parametrize("counts", [[7, 5, 9, 3], [0, 20, 0, 4], [0, 0, 0, 0]])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_like_megatrons_loop(
    counts: list[int], precision: str, tolerance: float, single_process: Layout
) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    expected = run(build(SequentialMLP, single_process, precision), counts, dtype)
    found = run(build(Experts, single_process, precision), counts, dtype)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        scale = float(tensor.abs().max()) if tensor.numel() else 0.0
        torch.testing.assert_close(
            found[name], tensor, atol=tolerance * scale, rtol=0, msg=lambda text, n=name: n + text
        )
