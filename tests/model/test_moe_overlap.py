"""The overlapped exchange of a MoE layer against Megatron's, on the output and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_m1.config import TrainConfig
from parallel.layout import Layout
from tests.distributed import Pool
from tests.training.small_run import MODEL

TOKENS = 20
LAYOUTS = {
    "ep2": (2, Layout(ep=2)),
    "etp2": (2, Layout(etp=2)),
    "tp2_ep2": (2, Layout(tp=2, ep=2)),
    "tp2_ep2_no_sp": (2, Layout(tp=2, ep=2, sequence_parallel=False)),
    "tp2_etp2_ep2": (4, Layout(tp=2, etp=2, ep=2)),
    "ep4": (4, Layout(ep=4)),
}


def moe(layout: Layout, recompute: str, capacity: float | None) -> dict[str, Tensor]:
    """One MoE layer over the built groups on tokens of its own; output, and gradients by name."""
    from megatron_m1.model.moe import MoE
    from megatron_m1.model.transformer_config import transformer_config

    train = TrainConfig(recompute=recompute, recompute_modules=["moe"])
    model = replace(MODEL, capacity_factor=capacity)
    layer = MoE(transformer_config(model, layout, train)).train()
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    dist.broadcast(layer.router.weight.data, src=0)

    row = torch.randn(TOKENS, 1, MODEL.hidden_size, generator=generator)
    if not layout.uses_sequence_parallel:
        dist.broadcast(row, src=dist.get_rank() // layout.tp * layout.tp, group=layer.tp_group)
    row.requires_grad_()
    output, _ = layer(row)
    output.sin().sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "row": row.grad, **gradients}


def pairs(layout: Layout) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(overlapped, Megatron's) for several numbers of parts, with recomputation and with drops."""
    from megatron.core import tensor_parallel

    layout.build_groups()
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return [
        (
            moe(replace(layout, moe_overlap_groups=parts), recompute, capacity),
            moe(layout, "none", capacity),
        )
        for parts, recompute, capacity in (
            (2, "none", None),
            (3, "selective", None),
            (2, "none", 0.5),
        )
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_overlap_changes_nothing(name: str, ranks: Callable[[int], Pool]) -> None:
    size, layout = LAYOUTS[name]
    for result in ranks(size).run(pairs, layout):
        for overlapped, plain in result:
            assert overlapped.keys() == plain.keys()
            for key, tensor in plain.items():
                # The weights' gradients are sums over the parts; the rest is equal bit for bit
                # where a matrix product does not depend on its number of rows.
                scale = float(tensor.abs().max())
                torch.testing.assert_close(
                    overlapped[key], tensor, rtol=0, atol=2e-6 * scale, msg=f"{name} {key}"
                )
