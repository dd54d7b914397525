"""The decays of lightning layers that transformers stores beside the weights.

They follow from the sizes of the model, but ``MiniMaxForCausalLM`` takes what the file says over
what it works out itself. So they are written with MiniMax's slopes, which its own differ from by
1e-5, and read to refuse a model that decays otherwise.

H heads, B tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_m1.conversion.safetensors_file import Form
from megatron_m1.conversion.weights import shown
from megatron_m1.model.config import LIGHTNING, ModelConfig

_PREFIX = "model.layers.{layer}.self_attn."
_SLOPES = "slope_rate"
# What transformers' slopes may differ by from MiniMax's (see ``decay_slopes``); a decay is of up to
# a block of them.
_TOLERANCE = 1e-4


def _query_decay(slopes_H11: Tensor, block: int) -> Tensor:
    return torch.exp(-slopes_H11 * (torch.arange(block) + 1)[:, None])


def _key_decay(slopes_H11: Tensor, block: int) -> Tensor:
    return torch.exp(-slopes_H11 * (block - 1 - torch.arange(block))[:, None])


def _diagonal_decay(slopes_H11: Tensor, block: int) -> Tensor:
    distance_BB = torch.arange(block)[:, None] - torch.arange(block)
    return torch.where(distance_BB >= 0, torch.exp(-slopes_H11 * distance_BB), 0.0)[None]


_MAKERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    _SLOPES: lambda slopes, block: slopes,
    "query_decay": _query_decay,
    "key_decay": _key_decay,
    "diagonal_decay": _diagonal_decay,
}


def decay_forms(model: ModelConfig, block: int) -> dict[str, Form]:
    """Every stored decay of a model."""
    heads = model.num_attention_heads
    shapes = {
        _SLOPES: (heads, 1, 1),
        "query_decay": (heads, block, 1),
        "key_decay": (heads, block, 1),
        "diagonal_decay": (1, heads, block, block),
    }
    return {
        _PREFIX.format(layer=layer) + name: Form(torch.float32, shape)
        for layer, kind in enumerate(model.layer_kinds)
        if kind == LIGHTNING
        for name, shape in shapes.items()
    }


def decay(name: str, model: ModelConfig, block: int) -> Tensor:
    """The stored decay of this name, by MiniMax's slopes."""
    from parallel import host

    host.enable()
    from megatron_m1.model.lightning_attention import decay_slopes

    layer, part = int(name.split(".")[2]), name.split(".")[-1]
    slopes = decay_slopes(model.num_attention_heads, layer, model.num_layers)
    return _MAKERS[part](slopes[:, None, None], block).contiguous()


def decay_problems(
    names: set[str], read: Callable[[str], Tensor], model: ModelConfig, block: int
) -> list[str]:
    """Which stored decays are those of another model than ours."""
    found = []
    for name in sorted(names):
        steps = 1 if name.endswith(f".{_SLOPES}") else block
        if not _is_alike(read(name), decay(name, model, block), steps * _TOLERANCE):
            found.append(name)
    if not found:
        return []
    return [
        f"{len(found)} of {len(names)} stored decays are not MiniMax's, which this project's model "
        f"has: {shown(found)}"
    ]


def _is_alike(theirs: Tensor, ours: Tensor, tolerance: float) -> bool:
    """Whether they are the same but for ``tolerance`` and for the digits that theirs are stored
    in, since transformers rounds them with the weights."""
    if theirs.shape != ours.shape or not theirs.is_floating_point():
        return False
    largest = (theirs.float() - ours).abs().max().item()
    # Not the other way round: a difference that is not a number is none that is small.
    return largest <= tolerance + torch.finfo(theirs.dtype).eps
