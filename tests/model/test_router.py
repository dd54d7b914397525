"""The router's balancing and z-loss: their scale, their gradients, and rows over several ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.layout import Layout
from tests.distributed import Pool
from tests.training.small_run import MODEL

TOKENS, AUX, Z = 48, 0.3, 0.2


def weight_and_row() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(MODEL.num_experts, MODEL.hidden_size, generator=generator) * 0.3
    return weight, torch.randn(TOKENS, 1, MODEL.hidden_size, generator=generator)


def route(aux: float, z: float, parts: int = 1) -> dict[str, Any]:
    """Losses of this rank's part of the row as Megatron records them, and their gradients."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import moe_utils

    from megatron_m1.model.router import Float32Router
    from megatron_m1.model.transformer_config import transformer_config

    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    everyone = dist.group.WORLD
    groups = ProcessGroupCollection(
        tp=alone, cp=everyone, tp_cp=everyone, tp_dp_cp=everyone, tp_ep=alone
    )
    config = transformer_config(replace(MODEL, aux_loss_coef=aux, z_loss_coef=z), Layout())
    router = Float32Router(config, groups).train()
    router.set_layer_number(1)
    weight, row = weight_and_row()
    router.weight.data = weight
    row = row.chunk(parts)[dist.get_rank()].clone().requires_grad_()

    moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    moe_utils.clear_aux_losses_tracker()
    probs, _ = router(row)
    (0.0 * probs.sum()).backward()
    recorded = {
        name: float(entry["values"][0])
        for name, entry in moe_utils.get_moe_layer_wise_logging_tracker().items()
    }
    return {"recorded": recorded, "weight": router.weight.grad, "row": row.grad}


def shares_and_probs(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """f and P: [E] shares of the assignments, and [E] mean probabilities."""
    chosen = logits_TE.topk(MODEL.router_topk, dim=1).indices
    shares = torch.bincount(chosen.flatten(), minlength=MODEL.num_experts) / chosen.numel()
    return shares, logits_TE.softmax(dim=1).mean(dim=0)


def by_formula() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(balancing loss, z-loss, weight, row), from the definitions."""
    weight, row = (tensor.requires_grad_() for tensor in weight_and_row())
    logits = row[:, 0] @ weight.T
    shares, probs = shares_and_probs(logits)
    balancing = MODEL.num_experts * (shares * probs).sum()
    return balancing, logits.logsumexp(dim=1).square().mean(), weight, row


@pytest.mark.parametrize(("aux", "z"), [(AUX, 0.0), (0.0, Z), (AUX, Z)])
@pytest.mark.parametrize("parts", [1, 2])
def test_losses_count_once_for_every_token(
    aux: float, z: float, parts: int, ranks: Callable[[int], Pool]
) -> None:
    """Ranks that hold parts of one row add up to the gradient of the whole row's losses."""
    results = ranks(parts).run(route, aux, z, parts)
    balancing, squared, weight, row = by_formula()
    (TOKENS * (aux * balancing + z * squared)).backward()
    total = sum(result["weight"] for result in results)
    torch.testing.assert_close(total, weight.grad, rtol=1e-4, atol=1e-5)
    joined = torch.cat([result["row"] for result in results])
    torch.testing.assert_close(joined, row.grad, rtol=1e-4, atol=1e-6)
    for name, coefficient, loss in (
        ("load_balancing_loss", aux, balancing),
        ("z_loss", z, squared),
    ):
        if coefficient:
            # Megatron sums the recorded shares over the group when it reports them.
            recorded = sum(result["recorded"][name] for result in results)
            assert recorded == pytest.approx(float(loss), rel=1e-5)


def test_conversion_to_transformers_scale() -> None:
    """transformers counts a token once for each of its experts: K times Megatron's value."""
    from transformers.models.minimax.modeling_minimax import load_balancing_loss_func

    balancing, _, weight, row = by_formula()
    logits = (row[:, 0] @ weight.T).detach()
    theirs = load_balancing_loss_func((logits,), MODEL.num_experts, MODEL.router_topk)
    assert float(theirs) == pytest.approx(MODEL.router_topk * float(balancing), rel=1e-5)


def test_transformers_averages_over_layers() -> None:
    """Megatron adds each layer's loss; transformers takes one loss of the layers' mean shares and
    mean probabilities, so equal layers weigh 1 / layers of what they weigh here."""
    from transformers.models.minimax.modeling_minimax import load_balancing_loss_func

    _, _, weight, row = by_formula()
    logits = [((row[:, 0] + shift) @ weight.T).detach() for shift in (0.0, 0.7, -0.7)]
    theirs = load_balancing_loss_func(tuple(logits), MODEL.num_experts, MODEL.router_topk)
    pairs = zip(*map(shares_and_probs, logits), strict=True)
    shares, probs = (torch.stack(parts) for parts in pairs)
    ours = MODEL.num_experts * (shares.mean(dim=0) * probs.mean(dim=0)).sum()
    assert float(theirs) == pytest.approx(MODEL.router_topk * float(ours), rel=1e-5)
