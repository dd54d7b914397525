"""How weights start: the same numbers for the same seed in every layout.

Each tensor of the whole model (in MiniMax's names) is drawn from a generator of its own, seeded by
the run's seed and the tensor's name; a rank then takes its part, as if it read a checkpoint.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.parameters import load_parameters
from parallel import host

# What DeepNet (arXiv 2203.00555, section 2.2) scales by beta: values, output projections, FFN.
_SCALED = ("v_proj", "o_proj", "out_proj", "w1", "w2", "w3")


def initialize(chunk: nn.Module, model: ModelConfig, seed: int) -> None:
    """Fill every parameter of a chunk from ``seed``."""

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        return initial_tensor(name, shape, model, seed)

    load_parameters(chunk, model, draw)


def initial_tensor(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """The start of one tensor of the whole model, float32: ones for norms, else a normal whose
    standard deviation is Xavier's sqrt(2 / (fan_in + fan_out)) or ``init.std`` cut at three."""
    if len(shape) == 1:
        return torch.ones(shape, device=host.device())
    generator = torch.Generator(device=host.device())
    generator.manual_seed(_seed_of(name, seed))
    weight = torch.empty(shape, device=host.device())
    if model.init.method == "xavier_normal":
        std = (2 / sum(shape)) ** 0.5
        weight.normal_(std=std, generator=generator)
    else:
        std = model.init.std
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)
    if model.init.deepnorm_gain:
        _scale_by_beta(weight, name, model)
    return weight


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _scale_by_beta(weight: Tensor, name: str, model: ModelConfig) -> None:
    """DeepNorm's gain (8N)^-0.25, in place; of the fused qkv only the values' rows."""
    beta = (8 * model.num_layers) ** -0.25
    matrix = name.split(".")[-2]
    if matrix in _SCALED:
        weight.mul_(beta)
    elif matrix == "qkv_proj":
        weight.view(-1, 3, model.head_dim, model.hidden_size)[:, 2].mul_(beta)
